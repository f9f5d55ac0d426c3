"""The interface of all text encoders: prompts -> token states (B, L, D) and mask (B, L).

The transformer joins the states of all encoders of a model token-wise.
"""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_snapgen.settings import check_unicode

Prompt = str | None
"""None is absent text: none of its tokens counts."""


PAD_TO = 32
"""The states of public models are padded to a multiple of this, so that a training step is compiled
for few lengths."""


class TextStates(NamedTuple):
    """The output of one text encoder."""

    states: mx.array
    """(B, L, D)."""
    mask: mx.array
    """(B, L), true where a token counts."""


class Tokenizer(Protocol):
    """Prompts to token ids, padded to a fixed length."""

    max_length: int
    """Tokens per prompt, begin and end marks included."""

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one prompt without begin mark, end mark, padding or truncation."""
        ...

    def cut(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `max_length`; "" if all of it fits."""
        ...

    def unknown(self, prompt: str) -> list[str]:
        """The parts of a prompt that have no token, mostly characters of other scripts."""
        ...

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, max_length) int32 and mask (B, max_length)."""
        ...


class PromptFormat(NamedTuple):
    """How a teacher's prompts are encoded."""

    model_types: tuple[str, ...]
    """Of the language model, as in its config.json."""
    template: str
    """The text that is encoded; the prompt replaces {}."""
    dropped: int
    """Tokens at the beginning whose states are dropped."""
    max_length: int
    """Maximum number of tokens, without the dropped ones; longer prompts are truncated."""
    empty: Prompt
    """The prompt of the unconditional velocity of guidance."""
    skipped_layers: int = 0
    """Number of last layers that are not run; if there are any, the final norm is not run
    either."""
    joined_layers: tuple[int, ...] = ()
    """Layers, counted from 1, whose outputs are joined to one state for each token; the later ones
    are not run. Empty: the state is the output of the last layer."""
    is_filled: bool = False
    """Prompts are padded to `max_length`, and the padding counts as text."""

    def unconditional(self, negative_prompt: str = "") -> Prompt:
        """The prompt to guide away from: `empty` without a negative prompt.

        Prompts and negative prompts, also blank ones, are encoded as they are, as in diffusers'
        pipelines.
        """
        return negative_prompt or self.empty


class PublicTextEncoder(Protocol):
    """The text encoder of a public model."""

    prompt_format: PromptFormat

    def __call__(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """Prompts -> states (B, L, D), zero where padded, and mask (B, L); evaluated.

        L is a multiple of 32, or `max_length` if prompts are padded to that.
        """
        ...

    def cut(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `max_length`; "" if all of it fits."""
        ...


class TextEncoder(Protocol):
    """A network that encodes prompts."""

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, L) int32 and mask (B, L), true where a token counts.

        L is fixed by the encoder. The empty prompt still has one token that counts.
        """
        ...

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """Tokens and mask (B, L) -> states (B, L, D)."""
        ...


def encode_states(
    prompts: Sequence[Prompt], encoders: Sequence[TextEncoder | None], *, dtype: mx.Dtype
) -> list[TextStates | None]:
    """The states of the prompts from each encoder, cast to `dtype`; None for an absent one."""
    states: list[TextStates | None] = []
    present = present_prompts(prompts)
    for encoder in encoders:
        if encoder is None:
            states.append(None)
        else:
            tokens, mask = encoder.tokenize([prompt or "" for prompt in prompts])
            # Absent text is masked after the encoder: attention over no token is undefined.
            states.append(TextStates(encoder(tokens, mask).astype(dtype), mask & present))
    return states


def present_prompts(prompts: Sequence[Prompt]) -> mx.array:
    """(B, 1), false for absent text."""
    return mx.array([[prompt is not None] for prompt in prompts])


def padded(rows: Sequence[Sequence[int]], length: int, *, pad: int) -> tuple[mx.array, mx.array]:
    """Token ids, padded on the right -> tokens (B, length) int32 and mask (B, length)."""
    tokens = [[*row, *[pad] * (length - len(row))] for row in rows]
    mask = [[i < len(row) for i in range(length)] for row in rows]
    return mx.array(tokens, mx.int32), mx.array(mask)


def normalize(prompt: str) -> str:
    """Lower case, composed Unicode, single spaces; also applied to training captions."""
    check_unicode(prompt, "prompt")
    return " ".join(unicodedata.normalize("NFKC", prompt).lower().split())
