"""Qwen-Image's transformer (arXiv 2508.02324; diffusers' QwenImageTransformer2DModel).

Text and picture are two streams with separate weights and joint attention. Modulation is
adaLN-zero, per block and stream. Positions are MSRoPE: rows and columns counted from the picture's
center, and the text on the diagonal beyond its edge.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.cached import bounded_cache
from mlx_snapgen.networks.exponentials import gelu, silu
from mlx_snapgen.networks.joint_attention import JointAttention
from mlx_snapgen.networks.layers import (
    checkpointed,
    layer_norm,
    pack,
    sinusoids,
    split,
    unpack,
)
from mlx_snapgen.networks.rope import Rope, axis_frequencies, token_grid
from mlx_snapgen.public_config import QwenTransformerConfig


@bounded_cache(16 * 2**20)
def msrope_table(
    height: int, width: int, *, text_length: int, axes: tuple[int, ...], theta: float
) -> Rope:
    """Cosines and sines (text_length + height * width, head_dim/2): the text, then the picture.

    A picture token is at frame 0 and rows -(height - height//2) .. height//2 - 1, with the same
    rule for columns. Text token i is at max(height//2, width//2) + i on all three axes.
    """
    rows, columns = (np.arange(n) - (n - n // 2) for n in (height, width))
    picture = np.stack(
        [np.zeros(height * width), np.repeat(rows, width), np.tile(columns, height)], axis=-1
    )
    text = np.arange(text_length)[:, None] + max(height // 2, width // 2)
    positions = np.concatenate([np.repeat(text, 3, axis=-1), picture])
    frequencies = axis_frequencies(axes, theta)
    angles = np.concatenate([positions[:, i : i + 1] * f for i, f in enumerate(frequencies)], -1)
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


class TimestepEmbedder(nn.Module):
    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.linear_1 = nn.Linear(frequency_dim, dims)
        self.linear_2 = nn.Linear(dims, dims)


class TimeEmbedding(nn.Module):
    """Noise level (B,) in [0, 1] -> (B, dims)."""

    def __init__(self, frequency_dim: int, dims: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(frequency_dim, dims)
        self._frequency_dim = frequency_dim

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        x = self.timestep_embedder.linear_1(sinusoids(t, self._frequency_dim).astype(dtype))
        return self.timestep_embedder.linear_2(silu(x))


class GELULinear(nn.Module):
    def __init__(self, dims: int, hidden_dims: int):
        super().__init__()
        self.proj = nn.Linear(dims, hidden_dims)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        # The identity has the index of the public network's dropout.
        self.net = [GELULinear(dims, 4 * dims), nn.Identity(), nn.Linear(4 * dims, dims)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """One dual-stream block."""

    def __init__(self, dims: int, head_dim: int):
        super().__init__()
        self.img_mod = [nn.SiLU(), nn.Linear(dims, 6 * dims)]
        self.txt_mod = [nn.SiLU(), nn.Linear(dims, 6 * dims)]
        self.attn = JointAttention(dims, head_dim, bias=True)
        self.img_mlp = FeedForward(dims)
        self.txt_mlp = FeedForward(dims)

    def __call__(
        self,
        picture: mx.array,
        text: mx.array,
        *,
        embedding: mx.array,
        rope: Rope,
        mask: mx.array | None,
        save_memory: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """picture (B, N, d), text (B, L, d), embedding of the time (B, d) -> both streams."""
        streams = []
        for x, (activate, linear) in ((picture, self.img_mod), (text, self.txt_mod)):
            modulation = linear(activate(embedding))[:, None]
            # shift, scale, gate of attention, then of the MLP: six of (B, 1, d)
            streams.append((x, split(modulation, 6, axis=-1)))
        modulated = [layer_norm(x) * (1 + m[1]) + m[0] for x, m in streams]
        attended = self.attn(*modulated, rope=rope, mask=mask, save_memory=save_memory)
        done = []
        for (x, m), out, mlp in zip(streams, attended, (self.img_mlp, self.txt_mlp), strict=True):
            x = x + m[2] * out
            done.append(x + m[5] * mlp(layer_norm(x) * (1 + m[4]) + m[3]))
        return done[0], done[1]


class ModulatedNorm(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Linear(dims, 2 * dims)

    def __call__(self, x: mx.array, embedding: mx.array) -> mx.array:
        scale, shift = split(self.linear(silu(embedding))[:, None], 2, axis=-1)
        return layer_norm(x) * (1 + scale) + shift


class QwenTransformer(nn.Module):
    """Velocity v = eps - x0 of Qwen-Image's latents."""

    BLOCKS = ("transformer_blocks",)
    """Path of the layers that may be quantized."""

    def __init__(self, config: QwenTransformerConfig):
        super().__init__()
        self.config = config
        self._checkpoint = False
        d, packed = config.hidden_size, config.latent_channels * config.patch_size**2
        self.img_in = nn.Linear(packed, d)
        self.txt_norm = nn.RMSNorm(config.text_dims, eps=1e-6)
        self.txt_in = nn.Linear(config.text_dims, d)
        self.time_text_embed = TimeEmbedding(config.frequency_dim, d)
        self.transformer_blocks = [Block(d, config.head_dim) for _ in range(config.num_layers)]
        self.norm_out = ModulatedNorm(d)
        self.proj_out = nn.Linear(d, packed)

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """See `VelocityNetwork.checkpoint_blocks`."""
        self._checkpoint = enabled

    @property
    def dtype(self) -> mx.Dtype:
        """Floating type of the weights."""
        # A norm's weight is never quantized.
        return self.txt_norm.weight.dtype

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        return_features: bool = False,
    ) -> Any:
        """See `VelocityNetwork.__call__`; the features are the picture stream's."""
        config = self.config
        b, height, width, _ = x_t.shape
        patch = config.patch_size
        grid = token_grid(height, width, patch)
        x = self.img_in(pack(x_t, patch).astype(self.dtype))
        h = self.txt_in(self.txt_norm(text.astype(self.dtype)))
        if mask is not None:
            everywhere = mx.ones((b, x.shape[1]), mx.bool_)
            mask = mx.concatenate([mask.astype(mx.bool_), everywhere], axis=1)[:, None, None]
        embedding = self.time_text_embed(t, self.dtype)
        rope = msrope_table(
            *grid, text_length=h.shape[1], axes=config.rope_axes, theta=config.rope_theta
        )
        for block in self.transformer_blocks:
            inputs = {"picture": x, "text": h, "embedding": embedding}
            if self._checkpoint:
                x, h = checkpointed(block, inputs, rope=rope, mask=mask, save_memory=True)
            else:
                x, h = block(**inputs, rope=rope, mask=mask)
        v = unpack(self.proj_out(self.norm_out(x, embedding)), grid, patch=patch)
        v = v.astype(x_t.dtype)
        return (v, x.astype(x_t.dtype)) if return_features else v
