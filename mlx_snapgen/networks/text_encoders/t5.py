"""The encoder of T5 1.1 and FLAN-T5 (transformers' T5EncoderModel), and its tokenizer.

Attention is bidirectional and has no scale. Its scores get a learned number for each head and
distance between two tokens, the same in all layers.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.exponentials import gelu
from mlx_snapgen.networks.layers import merge_heads, split_heads
from mlx_snapgen.networks.text_encoders.base import PAD_TO, Prompt, PromptFormat, padded
from mlx_snapgen.networks.text_encoders.sentencepiece import load_processor
from mlx_snapgen.public_config import T5Config
from mlx_snapgen.reading import read_bytes
from mlx_snapgen.settings import check_unicode

FLAN_T5 = PromptFormat(
    model_types=("t5",),
    template="{}",
    dropped=0,
    max_length=256,
    empty=None,
)
"""MiniT2I's: a FLAN-T5. Its unconditional text is absent."""


def buckets(length: int, *, count: int, max_distance: int) -> np.ndarray:
    """Bucket (L, L) of the distance from each query to each key.

    Half of the `count` buckets are for keys after the query. Of each half, the first half are for
    single distances; the others grow logarithmically up to `max_distance`.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, away = count // 2, np.abs(distance)
    exact = half // 2
    # In float32 and in this order, so that the limits of the buckets are transformers'.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    growth = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(away < exact, away, far)


class Attention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.q, self.k, self.v = (
            nn.Linear(config.hidden_size, inner, bias=False) for _ in range(3)
        )
        self.o = nn.Linear(inner, config.hidden_size, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self._head_dim = config.head_dim

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        q, k, v = (split_heads(f(x), self._head_dim) for f in (self.q, self.k, self.v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(merge_heads(out))


class AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        self.SelfAttention = Attention(config, has_bias=has_bias)
        self.layer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class GatedMLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        d, hidden = config.hidden_size, config.mlp_size
        self.wi_0, self.wi_1 = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.wo = nn.Linear(hidden, d, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.wo(gelu(self.wi_0(x)) * self.wi_1(x))


class MLPLayer(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        self.layer = [AttentionLayer(config, has_bias=has_bias), MLPLayer(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [Block(config, has_bias=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class T5Encoder(nn.Module):
    """Tokens (B, L) and mask (B, L) -> states (B, L, D). The modules have the public names."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config)

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        config, x = self.config, self.shared(tokens)
        first = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        places = buckets(
            tokens.shape[1], count=config.num_buckets, max_distance=config.max_distance
        )
        bias = first[mx.array(places)].transpose(2, 0, 1)[None].astype(mx.float32)
        bias = mx.where(mask[:, None, None], bias, -mx.inf).astype(x.dtype)
        for block in self.encoder.block:
            x = block(x, bias)
            # Otherwise, on the CPU, the dequantized weights of several layers are in memory.
            mx.eval(x)
        return self.encoder.final_layer_norm(x)


class T5Tokenizer:
    """Sentencepiece tokens with an end mark, as transformers' T5Tokenizer makes them.

    Args:
        model: serialized sentencepiece model, with an end mark and padding.
    """

    def __init__(self, model: bytes):
        self.model = model
        self._processor = load_processor(model)
        self.end, self.pad = self._processor.eos_id(), self._processor.pad_id()
        if self.end < 0 or self.pad < 0:
            raise UserError("it has no end mark or no padding")

    @classmethod
    def from_file(cls, path: Path) -> "T5Tokenizer":
        """Read a `spiece.model`; `UserError` for one that is missing or damaged."""
        try:
            return cls(read_bytes(path))
        except UserError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error}") from None

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, prompt: str, *, max_length: int) -> list[int]:
        """Tokens of a prompt, cut to `max_length` with its end mark."""
        check_unicode(prompt, "prompt")
        return [*self._processor.encode(prompt)[: max_length - 1], self.end]

    def cut(self, prompt: str, *, max_length: int) -> str:
        """The end of a prompt that `encode` drops."""
        return self._processor.decode(self._processor.encode(prompt)[max_length - 1 :])


class T5PromptEncoder:
    """Prompts -> states of a T5. A `PublicTextEncoder`."""

    def __init__(self, network: T5Encoder, tokenizer: T5Tokenizer, *, prompt_format: PromptFormat):
        self.network, self.tokenizer, self.prompt_format = network, tokenizer, prompt_format

    def cut(self, prompt: str) -> str:
        """See `PublicTextEncoder.cut`."""
        return self.tokenizer.cut(prompt, max_length=self.prompt_format.max_length)

    def __call__(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """See `PublicTextEncoder.__call__`; of absent text no token counts."""
        most = self.prompt_format.max_length
        rows = [self.tokenizer.encode(prompt or "", max_length=most) for prompt in prompts]
        length = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
        tokens, mask = padded(rows, length, pad=self.tokenizer.pad)
        states = self.network(tokens, mask)
        # Absent text is masked after the network: attention over no token is undefined.
        mask = mask & mx.array([[prompt is not None] for prompt in prompts])
        states = mx.where(mask[..., None], states, 0)
        mx.eval(states, mask)
        return states, mask
