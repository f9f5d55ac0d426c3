"""The default model's text encoder: a small bidirectional transformer, trained with the model.

Its tokens are sentencepiece's.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import sentencepiece

from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.exponentials import gelu
from mlx_snapgen.networks.layers import attend, merge_heads, split, split_heads
from mlx_snapgen.networks.text_encoders.base import Tokenizer, normalize, padded
from mlx_snapgen.reading import read_bytes


def load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a serialized model; `UserError` if it is none."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        # The constructor ignores an empty model.
        processor.LoadFromSerializedProto(model)
    except RuntimeError:  # its text names a line of sentencepiece's source
        raise UserError("it is not a sentencepiece model") from None
    return processor


class SentencePieceTokenizer:
    """Sentencepiece tokens between begin and end marks, padded to a fixed length.

    Args:
        model: serialized sentencepiece model; unk 0, begin 1, end 2, pad 3.
        max_length: tokens per prompt, marks included.
    """

    def __init__(self, model: bytes, max_length: int):
        self.model, self.max_length = model, max_length
        self._processor = load_processor(model)

    @classmethod
    def from_file(cls, path: Path, max_length: int) -> "SentencePieceTokenizer":
        """Read a sentencepiece `.model` file."""
        try:
            return cls(read_bytes(path), max_length)
        except UserError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error}") from None

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def pieces(self) -> list[str]:
        """The text of each token, in the order of their numbers."""
        return [self._processor.id_to_piece(k) for k in range(self.vocab_size)]

    def encode(self, prompt: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._processor.encode(normalize(prompt))

    def cut(self, prompt: str) -> str:
        """See `Tokenizer.cut`."""
        return self._processor.decode(self.encode(prompt)[self.max_length - 2 :])

    def unknown(self, prompt: str) -> list[str]:
        """See `Tokenizer.unknown`."""
        pieces = self._processor.encode(normalize(prompt), out_type=str)
        unk = self._processor.unk_id()
        tokens = zip(pieces, self.encode(prompt), strict=True)
        return [piece.strip("\u2581") for piece, token in tokens if token == unk]

    def __call__(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `Tokenizer.__call__`."""
        begin, end, pad = (getattr(self._processor, f"{n}_id")() for n in ("bos", "eos", "pad"))
        rows = [[begin, *self.encode(p)[: self.max_length - 2], end] for p in prompts]
        return padded(rows, self.max_length, pad=pad)


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * mx.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu_tanh": gelu, "gelu": nn.gelu, "quick_gelu": quick_gelu}
"""`TextEncoderConfig.activation` -> the function."""


class Layer(nn.Module):
    """Pre-norm attention and MLP; `mlp_size` is 4 `dims` if None."""

    def __init__(self, dims: int, num_heads: int, activation: str, *, mlp_size: int | None = None):
        super().__init__()
        mlp_size = mlp_size or 4 * dims
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"no activation '{activation}' for an encoder, known: {known}")
        if dims % num_heads:
            raise UserError(f"an encoder of {dims} does not divide into {num_heads} heads")
        self.norm1 = nn.LayerNorm(dims)
        self.qkv_proj = nn.Linear(dims, 3 * dims)
        self.out_proj = nn.Linear(dims, dims)
        self.norm2 = nn.LayerNorm(dims)
        self.linear1 = nn.Linear(dims, mlp_size)
        self.linear2 = nn.Linear(mlp_size, dims)
        self._head_dim = dims // num_heads
        self._activation = ACTIVATIONS[activation]

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        q, k, v = split(self.qkv_proj(self.norm1(x)), 3, axis=-1)
        q, k, v = (split_heads(y, self._head_dim) for y in (q, k, v))
        x = x + self.out_proj(merge_heads(attend(q, k, v, mask=mask)))
        return x + self.linear2(self._activation(self.linear1(self.norm2(x))))


class TransformerTextEncoder(nn.Module):
    """Bidirectional pre-norm transformer with learned positions."""

    def __init__(self, config: TextEncoderConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = mx.random.normal((config.max_length, config.hidden_size)) * 0.02
        self.layers = [
            Layer(config.hidden_size, config.num_heads, config.activation)
            for _ in range(config.num_layers)
        ]
        self.norm = nn.LayerNorm(config.hidden_size)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; `UserError` when the encoder was built without one."""
        if self._tokenizer is None:
            raise UserError("this text encoder was built without a tokenizer")
        return self._tokenizer

    def tokenize(self, prompts: Sequence[str]) -> tuple[mx.array, mx.array]:
        """See `TextEncoder.tokenize`."""
        return self.tokenizer(prompts)

    def __call__(self, tokens: mx.array, mask: mx.array) -> mx.array:
        """See `TextEncoder.__call__`; D is `config.hidden_size`."""
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return self.norm(x)
