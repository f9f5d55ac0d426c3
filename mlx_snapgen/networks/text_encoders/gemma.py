"""Gemma 3 as a text encoder, through mlx-lm (`pip install "mlx_snapgen[gemma]"`).

The paper conditions on Gemma-3-4b-it (SnapGen++ section 2). The states are those after the last
norm. Gemma is causal and knows no padding mask: padding stands on the right, where no token that
counts sees it, and the mask keeps it out of cross-attention.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.base import padded

FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
"""What of a repository `load_gemma` needs."""


class GemmaTokenizer:
    """Gemma's own tokenizer: a begin mark, then the prompt, padded to a fixed length.

    Args:
        tokenizer: as `mlx_lm.utils.load_tokenizer` gives it.
        max_length: tokens per prompt, the mark included.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self._tokenizer, self.max_length = tokenizer, max_length

    def encode(self, prompt: str) -> list[int]:
        """Token ids of one prompt without mark or padding, untruncated."""
        return self._tokenizer.encode(prompt.strip(), add_special_tokens=False)

    def cut(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `max_length`; "" when all of it does."""
        return self._tokenizer.decode(self.encode(prompt)[self.max_length - 1 :]).strip()

    def unknown(self, prompt: str) -> list[str]:
        """Nothing: Gemma spells what it has no token for in bytes."""
        return []

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """Prompts -> tokens (B, max_length) int32 and mask (B, max_length)."""
        begin, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id or 0
        rows = [[begin, *self.encode(p)[: self.max_length - 1]] for p in prompts]
        return padded(rows, self.max_length, pad)


class GemmaTextEncoder(nn.Module):
    """The last hidden states of a Gemma 3.

    Args:
        config: its kind is "gemma".
        model: mlx-lm's `Gemma3Model`, quantized or not.
        tokenizer: as `mlx_lm.utils.load_tokenizer` gives it.
    """

    def __init__(self, config: TextEncoderConfig, model: nn.Module, tokenizer: Any):
        super().__init__()
        self.config = config
        self.model = model
        self._tokenizer = GemmaTokenizer(tokenizer, config.max_length)

    @property
    def tokenizer(self) -> GemmaTokenizer:
        return self._tokenizer

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `TextEncoder.tokenize`."""
        return self.tokenizer(prompts)

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """See `TextEncoder.__call__`; D is `config.hidden_size`."""
        embeddings = self.model.embed_tokens(tokens)
        if embeddings.dtype == mx.float32:
            # mlx-lm scales by sqrt(D) rounded to bfloat16 in every type; the original rounds it to
            # the type it computes in.
            scale = self.config.hidden_size**0.5
            embeddings = embeddings * (scale / mx.array(scale, mx.bfloat16).item())
        # mlx-lm asks for the cache of the first full layer, which a short Gemma has not.
        cache = [None] * max(len(self.model.layers), self.model.sliding_window_pattern)
        return self.model(tokens, cache, input_embeddings=embeddings)


def load_gemma(folder: Path, config: TextEncoderConfig) -> GemmaTextEncoder:
    """A Gemma 3 from a folder in Hugging Face's or mlx-lm's format, quantized or not.

    Raises:
        UserError: mlx-lm is not installed, or the folder holds no Gemma 3 that fits `config`.
    """
    try:
        from mlx_lm.utils import load_model, load_tokenizer
    except ImportError:
        raise UserError(
            'Gemma needs mlx-lm: pip install "mlx_snapgen[gemma]", or leave this encoder out'
        ) from None
    try:
        model, values = load_model(folder, lazy=True)
        tokenizer = load_tokenizer(folder)
    except Exception as error:
        # Whatever a folder lacks, mlx-lm and transformers tell in exceptions of many kinds.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load Gemma from {folder}: {reason}") from None
    if values["model_type"] not in ("gemma3", "gemma3_text"):
        raise UserError(f"{folder} holds a {values['model_type']}, not a Gemma 3")
    text = getattr(model, "language_model", model).model
    if text.args.hidden_size != config.hidden_size:
        raise UserError(
            f"{folder} gives states of {text.args.hidden_size}, the model takes those of "
            f"{config.hidden_size}"
        )
    return GemmaTextEncoder(config, text, tokenizer)
