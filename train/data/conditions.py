"""A teacher's text states of captions, each caption encoded once."""

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.networks.cached import bounded_cache
from mlx_snapgen.teachers.base import Condition, Teacher
from train.data.source import TEACHER, Samples
from train.data.text import CACHE_BYTES, padded_states

ROUNDING = 0.02
"""Largest difference of stored states, relative to the largest number; float16 rounds to 0.0005."""


class Conditions:
    """Prompts -> a teacher's `Condition`, padded to a multiple of 32 tokens.

    Prompts are encoded one by one, so that the states do not depend on the batch. A limited number
    of states is kept; prepared data has them all.

    Args:
        teacher: its text encoder is used for prompts without stored states, and here for the
            unconditional text.

    Attributes:
        stored: whether states in the data are this teacher's, see `same_states`.
    """

    def __init__(self, teacher: Teacher):
        self.teacher, self.stored = teacher, False
        empty = teacher.encode([""])
        self.empty = _tokens(empty.empty_text, empty.empty_mask)
        self._cached = bounded_cache(CACHE_BYTES)(self._encode)

    def __call__(
        self, prompts: Sequence[str], states: Mapping[str, Sequence[np.ndarray]] | None = None
    ) -> Condition:
        """The condition of some prompts; "" is the unconditional text.

        Args:
            states: those of the prompts in the data, see `Samples.states`.
        """
        stored = (states or {}).get(TEACHER) if self.stored else None
        rows: list[mx.array | None] = []
        for k, prompt in enumerate(prompts):
            if not prompt:
                rows.append(self.empty)
            elif stored is not None:
                rows.append(mx.array(stored[k]))
            else:
                rows.append(self._cached(prompt))
        # One length for all, because guidance joins both in one batch.
        text, mask = padded_states([*rows, self.empty], self.empty)
        return Condition(text[:-1], mask[:-1], text[-1:], mask[-1:])

    def same_states(self, samples: Samples) -> bool:
        """Whether the first of these samples has this teacher's states, up to their rounding."""
        found, own = samples.states[TEACHER][0], self._cached(samples.captions[0])
        own = np.array(own.astype(mx.float32))  # numpy has no bfloat16, of teachers on a GPU
        if found.shape != own.shape:
            return False
        return bool(np.abs(found - own).max() <= ROUNDING * np.abs(own).max())

    def _encode(self, prompt: str) -> mx.array:
        condition = self.teacher.encode([prompt])
        return _tokens(condition.text, condition.mask)


def _tokens(text: mx.array, mask: mx.array) -> mx.array:
    """States (1, L, D) -> those of the tokens that count, (T, D)."""
    chosen = np.flatnonzero(np.array(mask[0]))
    states = mx.contiguous(mx.stop_gradient(text[0][mx.array(chosen.astype(np.int32))]))
    mx.eval(states)
    return states
