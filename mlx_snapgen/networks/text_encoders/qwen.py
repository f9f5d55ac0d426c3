"""The text encoder of public teachers: a Qwen language model, through mlx-lm.

Install it with `pip install "mlx_snapgen[public]"`. The model is causal and padding is on the
right: no token of the prompt attends to it.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.text_encoders.base import PAD_TO, Prompt, PromptFormat, padded

QWEN_IMAGE = PromptFormat(
    model_types=("qwen2_5_vl", "qwen2"),
    template="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    dropped=34,
    max_length=1024,
    empty=" ",
)
"""Qwen-Image's: Qwen2.5-VL's text tower, the template and its 34 tokens as in diffusers'
QwenImagePipeline."""

Z_IMAGE = PromptFormat(
    model_types=("qwen3",),
    template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    dropped=0,
    max_length=512,
    empty="",
    skipped_layers=1,
)
"""Z-Image's: Qwen3's chat template, and the states before the last layer, as in diffusers'
ZImagePipeline."""

FLUX2_KLEIN = PromptFormat(
    model_types=("qwen3",),
    template="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    dropped=0,
    max_length=512,
    empty="",
    joined_layers=(9, 18, 27),
    is_filled=True,
)
"""FLUX.2 klein's: Qwen3's chat template without thinking, and the layers, as in diffusers'
Flux2KleinPipeline."""


class QwenPromptEncoder:
    """Prompts -> states of a language model.

    Args:
        model: the network, tokens (B, L) -> states (B, L, D).
        tokenizer: as `mlx_lm.utils.load_tokenizer` gives it.
        prompt_format: how prompts are encoded.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, prompt_format: PromptFormat):
        self.model, self.prompt_format, self._tokenizer = model, prompt_format, tokenizer

    def tokenize(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, L) and mask (B, L), including the first tokens of the template."""
        most = self.prompt_format.dropped + self.prompt_format.max_length
        rows = [self._encode(self._filled(prompt))[:most] for prompt in prompts]
        kept = max(len(row) - self.prompt_format.dropped for row in rows)
        length = self.prompt_format.dropped + -(-kept // PAD_TO) * PAD_TO
        if self.prompt_format.is_filled:
            length = most
        return padded(rows, length, pad=self._tokenizer.pad_token_id or 0)

    def cut(self, prompt: str) -> str:
        """See `PublicTextEncoder.cut`."""
        _, end = self.prompt_format.template.split("{}")
        tokens = self._encode(self._filled(prompt))
        most = self.prompt_format.dropped + self.prompt_format.max_length
        return self._tokenizer.decode(tokens[most : len(tokens) - len(self._encode(end))]).strip()

    def _filled(self, prompt: Prompt) -> str:
        return self.prompt_format.template.replace("{}", prompt or "")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def __call__(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """Prompts -> states (B, L, D), zero where padded, and mask (B, L); evaluated.

        L is a multiple of 32, or `max_length` if prompts are padded to that.
        """
        tokens, mask = self.tokenize(prompts)
        layers = self.prompt_format.joined_layers
        if layers:
            states = joined_states(self.model, tokens, mask=mask, layers=layers)
        else:
            states = last_states(self.model, tokens)
        if self.prompt_format.is_filled:
            mask = mx.ones_like(mask)
        states, mask = (y[:, self.prompt_format.dropped :] for y in (states, mask))
        states = mx.where(mask[..., None], states, 0)
        mx.eval(states, mask)
        return states, mask


def last_states(model: Any, tokens: mx.array) -> mx.array:
    """The normalized output of mlx-lm's network: (B, L, D), layer by layer as `joined_states`."""
    h = model.embed_tokens(tokens)
    for layer in model.layers:
        h = layer(h, "causal")
        mx.eval(h)
    return model.norm(h)


def joined_states(
    model: Any, tokens: mx.array, *, mask: mx.array, layers: Sequence[int]
) -> mx.array:
    """The outputs of some layers of mlx-lm's network: (B, L, len(layers) * D).

    Args:
        tokens: (B, L).
        mask: (B, L), true where a token is no padding. Padding attends to the prompt alone, so
            that its states are those of transformers.
        layers: counted from 1, in ascending order.
    """
    h, found = model.embed_tokens(tokens), []
    seen = mx.tri(tokens.shape[1], dtype=mx.bool_) & mask[:, None, None]
    for i, layer in enumerate(model.layers[: layers[-1]], start=1):
        h = layer(h, seen)
        # Otherwise, on the CPU, the dequantized weights of several layers are in memory.
        mx.eval(h)
        if i in layers:
            found.append(h)
    return mx.concatenate(found, axis=-1)
