"""What all text encoders share, and prompts to the states that the transformer reads."""

import unicodedata
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx


class TextStates(tuple):
    """States (B, L, D) and mask (B, L; true where a token counts) of one text encoder."""

    def __new__(cls, states: mx.array, mask: mx.array):
        return super().__new__(cls, (states, mask))


class TextEncoder(Protocol):
    """What the pipeline and the trainers ask of a text encoder."""

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, L) int32 and mask (B, L), true where a token counts.

        L is fixed by the encoder. The empty prompt still has one token that counts.
        """

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """Tokens and mask (B, L) -> states (B, L, D)."""


def encode_states(
    prompts: Sequence[str], encoders: Sequence[TextEncoder | None], dtype: mx.Dtype
) -> list[TextStates | None]:
    """What each encoder says of the prompts, cast to `dtype`; None for one that is absent."""
    states: list[TextStates | None] = []
    for encoder in encoders:
        if encoder is None:
            states.append(None)
        else:
            tokens, mask = encoder.tokenize(prompts)
            states.append(TextStates(encoder(tokens, mask).astype(dtype), mask))
    return states


def padded(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[mx.array, mx.array]:
    """Token ids, padded on the right -> tokens (B, length) int32 and mask (B, length)."""
    tokens = [[*row, *[pad] * (length - len(row))] for row in rows]
    mask = [[i < len(row) for i in range(length)] for row in rows]
    return mx.array(tokens, mx.int32), mx.array(mask)


def normalise(prompt: str) -> str:
    """Lower case, composed Unicode, single spaces; the training captions pass through it too."""
    return " ".join(unicodedata.normalize("NFKC", prompt).lower().split())
