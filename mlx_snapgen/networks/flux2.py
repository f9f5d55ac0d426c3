"""FLUX.2 klein's transformer (diffusers' Flux2Transformer2DModel).

The first blocks have two streams, picture and text, with separate weights and joint attention. The
other blocks have one stream of both, and attention and MLP side by side. Modulation is adaLN-zero;
all blocks of a kind share it. RoPE has four axes: picture, row, column and word. Pictures to edit
are more tokens of the picture stream, each with a number of its own on the first axis.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.attention import attend_all
from mlx_snapgen.networks.cached import bounded_cache
from mlx_snapgen.networks.exponentials import silu
from mlx_snapgen.networks.joint_attention import JointAttention
from mlx_snapgen.networks.layers import (
    checkpointed,
    layer_norm,
    merge_heads,
    modulate,
    pack,
    sinusoids,
    split,
    split_heads,
    unpack,
)
from mlx_snapgen.networks.rope import Rope, axis_frequencies, rotate, token_grid
from mlx_snapgen.public_config import Flux2TransformerConfig

REFERENCE_STEP = 10
"""Reference pictures are at 10, 20, ... on the first axis of RoPE; the drawn picture is at 0."""

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@bounded_cache(64 * 2**20)
def rope_table(
    text_length: int, grids: tuple[Grid, ...], *, axes: tuple[int, ...], theta: float
) -> Rope:
    """Cosines and sines (tokens, head_dim/2): the text, the picture, then its references.

    Word i is at (0, 0, 0, i), and the token at a row and a column of picture k is at
    (10 k, row, column, 0).

    Args:
        grids: of the picture, then of each reference.
    """
    words = np.zeros((text_length, 4))
    words[:, 3] = np.arange(text_length)
    positions = [words]
    for k, (height, width) in enumerate(grids):
        rows, columns = np.divmod(np.arange(height * width), width)
        pictures, zeros = np.full(height * width, REFERENCE_STEP * k), np.zeros(height * width)
        positions.append(np.stack([pictures, rows, columns, zeros], axis=-1))
    table = np.concatenate(positions)
    frequencies = axis_frequencies(axes, theta)
    angles = np.concatenate([table[:, i : i + 1] * f for i, f in enumerate(frequencies)], axis=-1)
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


def swiglu(x: mx.array) -> mx.array:
    """(..., 2 d) -> (..., d)."""
    gate, value = split(x, 2, axis=-1)
    return silu(gate) * value


class TimestepEmbedder(nn.Module):
    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.linear_1 = nn.Linear(frequency_dim, dims, bias=False)
        self.linear_2 = nn.Linear(dims, dims, bias=False)


class TimeEmbedding(nn.Module):
    """Noise level (B,) in [0, 1] -> (B, dims)."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(frequency_dim, dims)
        self._frequency_dim = frequency_dim

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        x = self.timestep_embedder.linear_1(sinusoids(t, self._frequency_dim).astype(dtype))
        return self.timestep_embedder.linear_2(silu(x))


class Modulation(nn.Module):
    """Embedding of the time (B, dims) -> `count` of (B, 1, dims): shift, scale, gate, ..."""

    def __init__(self, dims: int, count: int):
        super().__init__()
        self.linear = nn.Linear(dims, count * dims, bias=False)
        self._count = count

    def __call__(self, embedding: mx.array) -> list[mx.array]:
        return split(self.linear(silu(embedding))[:, None], self._count, axis=-1)


class FeedForward(nn.Module):
    def __init__(self, dims: int, hidden_dims: int):
        super().__init__()
        self.linear_in = nn.Linear(dims, 2 * hidden_dims, bias=False)
        self.linear_out = nn.Linear(hidden_dims, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_out(swiglu(self.linear_in(x)))


class DoubleBlock(nn.Module):
    """A block with two streams."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        d, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.attn = JointAttention(d, config.head_dim, bias=False)
        self.ff, self.ff_context = FeedForward(d, hidden), FeedForward(d, hidden)

    def __call__(
        self,
        picture: mx.array,
        text: mx.array,
        *,
        modulation: Sequence[Sequence[mx.array]],
        rope: Rope,
        mask: mx.array | None,
        save_memory: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """picture (B, N, d), text (B, L, d) -> the same two.

        Args:
            modulation: of the picture, then of the text: shift, scale, gate of attention, then of
                the MLP; six of (B, 1, d).
        """
        streams = list(zip((picture, text), modulation, strict=True))
        attended = self.attn(
            *(modulate(layer_norm(x), m[0], m[1]) for x, m in streams),
            rope=rope,
            mask=mask,
            save_memory=save_memory,
        )
        done = []
        for (x, m), out, mlp in zip(streams, attended, (self.ff, self.ff_context), strict=True):
            x = x + m[2] * out
            done.append(x + m[5] * mlp(modulate(layer_norm(x), m[3], m[4])))
        return done[0], done[1]


class ParallelAttention(nn.Module):
    """Attention and MLP side by side, their first layers in one matrix, their last in another."""

    def __init__(self, dims: int, hidden_dims: int, *, head_dim: int):
        super().__init__()
        self.to_qkv_mlp_proj = nn.Linear(dims, 3 * dims + 2 * hidden_dims, bias=False)
        self.norm_q, self.norm_k = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        self.to_out = nn.Linear(dims + hidden_dims, dims, bias=False)
        self._dims, self._head_dim = dims, head_dim

    def __call__(
        self, x: mx.array, rope: Rope, *, mask: mx.array | None, save_memory: bool = False
    ) -> mx.array:
        d = self._dims
        *qkv, hidden = split(self.to_qkv_mlp_proj(x), (d, 2 * d, 3 * d), axis=-1)
        q, k, v = (split_heads(y, self._head_dim) for y in qkv)
        q, k = rotate(self.norm_q(q), *rope), rotate(self.norm_k(k), *rope)
        out = merge_heads(attend_all(q, k, v, mask=mask, save_memory=save_memory))
        return self.to_out(mx.concatenate([out, swiglu(hidden)], axis=-1))


class SingleBlock(nn.Module):
    """A block with one stream of text and picture."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        d, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.attn = ParallelAttention(d, hidden, head_dim=config.head_dim)

    def __call__(
        self,
        x: mx.array,
        *,
        modulation: Sequence[mx.array],
        rope: Rope,
        mask: mx.array | None,
        save_memory: bool = False,
    ) -> mx.array:
        """x (B, L + N, d); modulation: shift, scale, gate of (B, 1, d)."""
        shift, scale, gate = modulation
        h = modulate(layer_norm(x), shift, scale)
        return x + gate * self.attn(h, rope, mask=mask, save_memory=save_memory)


class ModulatedNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Linear(dims, 2 * dims, bias=False)

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        scale, shift = split(self.linear(silu(embedding))[:, None], 2, axis=-1)
        return modulate(layer_norm(x), shift, scale)


class Flux2Transformer(nn.Module):
    """Velocity v = eps - x0 of FLUX.2's latents."""

    BLOCKS = ("transformer_blocks", "single_transformer_blocks")
    """Path of the layers that may be quantized."""

    def __init__(self, config: Flux2TransformerConfig):
        super().__init__()
        self.config = config
        self._checkpoint = False
        d, packed = config.hidden_size, config.latent_channels * config.patch_size**2
        self.time_guidance_embed = TimeEmbedding(config.frequency_dim, d)
        self.double_stream_modulation_img = Modulation(d, 6)
        self.double_stream_modulation_txt = Modulation(d, 6)
        self.single_stream_modulation = Modulation(d, 3)
        self.x_embedder = nn.Linear(packed, d, bias=False)
        self.context_embedder = nn.Linear(config.text_dims, d, bias=False)
        self.transformer_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [
            SingleBlock(config) for _ in range(config.num_single_layers)
        ]
        self.norm_out = ModulatedNorm(d)
        self.proj_out = nn.Linear(d, packed, bias=False)

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """See `VelocityNetwork.checkpoint_blocks`."""
        self._checkpoint = enabled

    @property
    def dtype(self) -> mx.Dtype:
        """Floating type of the weights."""
        # Outside the blocks nothing is quantized.
        return self.x_embedder.weight.dtype

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        references: Sequence[mx.array] = (),
        return_features: bool = False,
    ) -> Any:
        """See `VelocityNetwork.__call__`.

        Args:
            references: normalized latents of pictures to edit, (B, h, w, C) or (1, h, w, C) each,
                of any size that divides by the patch size.
        """
        config, b = self.config, x_t.shape[0]
        pictures = [x_t, *(mx.broadcast_to(r, (b, *r.shape[1:])) for r in references)]
        grids = tuple(token_grid(p.shape[1], p.shape[2], config.patch_size) for p in pictures)
        tokens = [pack(p, config.patch_size).astype(self.dtype) for p in pictures]
        count, length = tokens[0].shape[1], text.shape[1]
        x = self.x_embedder(mx.concatenate(tokens, axis=1))
        h = self.context_embedder(text.astype(self.dtype))
        if mask is not None:
            everywhere = mx.ones((b, x.shape[1]), mx.bool_)
            mask = mx.concatenate([mask.astype(mx.bool_), everywhere], axis=1)[:, None, None]
        embedding = self.time_guidance_embed(t, self.dtype)
        rope = rope_table(length, grids, axes=config.rope_axes, theta=config.rope_theta)

        double = [
            self.double_stream_modulation_img(embedding),
            self.double_stream_modulation_txt(embedding),
        ]

        def run(block: nn.Module, **inputs: Any) -> Any:
            if self._checkpoint:
                return checkpointed(block, inputs, rope=rope, mask=mask, save_memory=True)
            return block(**inputs, rope=rope, mask=mask)

        for block in self.transformer_blocks:
            x, h = run(block, picture=x, text=h, modulation=double)
        single = self.single_stream_modulation(embedding)
        x = mx.concatenate([h, x], axis=1)
        for block in self.single_transformer_blocks:
            x = run(block, x=x, modulation=single)
        x = x[:, length : length + count]
        v = self.proj_out(self.norm_out(x, embedding))
        v = unpack(v, grids[0], patch=config.patch_size).astype(x_t.dtype)
        return (v, x.astype(x_t.dtype)) if return_features else v
