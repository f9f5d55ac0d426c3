"""Gemma 3 as a text encoder, through mlx-lm (`pip install "mlx_snapgen[public]"`).

The paper conditions on Gemma-3-4b-it (SnapGen++ section 2). The states are those after the last
norm. Gemma is causal and takes no padding mask: padding is on the right, so no token of the prompt
attends to it, and the mask excludes it from cross-attention.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.networks.text_encoders.base import padded


class GemmaTokenizer:
    """Gemma's own tokenizer: a begin mark, then the prompt, padded to a fixed length.

    Args:
        tokenizer: as `mlx_lm.utils.load_tokenizer` gives it.
        max_length: tokens per prompt, the mark included.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self._tokenizer, self.max_length = tokenizer, max_length

    def encode(self, prompt: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._tokenizer.encode(prompt.strip(), add_special_tokens=False)

    def cut(self, prompt: str) -> str:
        """See `Tokenizer.cut`."""
        return self._tokenizer.decode(self.encode(prompt)[self.max_length - 1 :]).strip()

    def unknown(self, prompt: str) -> list[str]:
        """Nothing: Gemma encodes characters without a token as bytes."""
        return []

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `Tokenizer.__call__`."""
        begin, pad = self._tokenizer.bos_token_id, self._tokenizer.pad_token_id or 0
        rows = [[begin, *self.encode(p)[: self.max_length - 1]] for p in prompts]
        return padded(rows, self.max_length, pad=pad)


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
        self.model: Any = model
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
        # mlx-lm reads the cache of the first full layer, which a short Gemma does not have.
        cache = [None] * max(len(self.model.layers), self.model.sliding_window_pattern)
        return self.model(tokens, cache, input_embeddings=embeddings)
