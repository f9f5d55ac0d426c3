"""The text of training batches: dropped captions, and the states of frozen text encoders.

Encoders of kind "transformer" are trained with the model, so that batches hold their tokens. All
others are public, frozen encoders: batches hold their states.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.networks.cached import bounded_cache

LENGTHS = 32
"""States are padded to multiples of this, so that few shapes of batches are compiled."""
CACHE_BYTES = 128 << 20
"""Memory for states of one encoder, of captions that come again."""


def is_trained(config: TextEncoderConfig) -> bool:
    """Whether a text encoder is trained with the model."""
    return config.kind == "transformer"


def kept_captions(
    rng: np.random.Generator, count: int, *, encoders: int, drop: float
) -> np.ndarray:
    """Which captions each text encoder gets, bool (count, encoders).

    With probability `drop` no encoder gets a caption, for guidance. Otherwise each of several
    encoders is dropped with that probability on its own, so that the model works with only some of
    them (SnapGen++ section 2).
    """
    kept = np.repeat(rng.random(count) >= drop, encoders).reshape(count, encoders)
    if encoders > 1:
        kept &= rng.random((count, encoders)) >= drop
    return kept


class FrozenStates:
    """Caption -> its states (L, D) from a frozen text encoder, without padding.

    Captions are encoded one by one, so that the states do not depend on the batch and the cache.
    """

    def __init__(self, encoder: Any):
        self._cached = bounded_cache(CACHE_BYTES)(functools.partial(encode_caption, encoder))

    def __call__(self, caption: str) -> mx.array:
        """The states of a caption."""
        return self._cached(caption)


def encode_caption(encoder: Any, caption: str) -> mx.array:
    """The states (L, D) of a caption from a frozen text encoder, without padding."""
    tokens, mask = encoder.tokenize([caption])
    count = int(mask.sum().item())
    length = padded_length(count, tokens.shape[1])
    states = encoder(tokens[:, :length], mask[:, :length])[0, :count]
    # A slice would keep the padding in memory.
    states = mx.contiguous(mx.stop_gradient(states))
    mx.eval(states)
    return states


class KnownPrompts:
    """A `TextEncoder` of a few prompts, which takes the place of a large one to free its memory.

    Its tokens are the number of the prompt.

    Args:
        encoder: frozen; not kept.
        prompts: those that can be encoded later, beside the empty one.
    """

    def __init__(self, encoder: Any, prompts: Iterable[str]):
        self.config: TextEncoderConfig = encoder.config
        self.prompts = list(dict.fromkeys(["", *prompts]))
        self._states = [encode_caption(encoder, prompt) for prompt in self.prompts]

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `TextEncoder`."""
        numbers = [self.prompts.index(prompt) for prompt in prompts]
        mask = self._padded(numbers)[1]
        return mx.broadcast_to(mx.array(numbers)[:, None], mask.shape), mask

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """See `TextEncoder`."""
        return self._padded(tokens[:, 0].tolist())[0]

    def _padded(self, numbers: Any) -> tuple[mx.array, mx.array]:
        return padded_states([self._states[n] for n in numbers], self._states[0])


def padded_length(count: int, most: int | None = None) -> int:
    """The next multiple of `LENGTHS`, at most `most` tokens."""
    length = max(LENGTHS, -(-count // LENGTHS) * LENGTHS)
    return length if most is None else min(length, most)


def padded_states(
    rows: Sequence[mx.array | None], like: mx.array, *, most: int | None = None
) -> tuple[mx.array, mx.array]:
    """Rows of states (L, D) -> states (B, L, D) and mask (B, L).

    Args:
        rows: None is absent text.
        like: has the width D and the type of the result.
        most: limit of L.
    """
    counts = [0 if row is None else len(row) for row in rows]
    length = padded_length(max(counts), most)
    empty = like[:0]
    padded = [
        mx.pad(empty if row is None else row.astype(like.dtype), [(0, length - count), (0, 0)])
        for row, count in zip(rows, counts, strict=True)
    ]
    return mx.stack(padded), mx.arange(length)[None] < mx.array(counts)[:, None]
