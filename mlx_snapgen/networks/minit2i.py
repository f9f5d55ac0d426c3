"""MiniT2I's transformer (MM-JiT): pixels in, pixels out, no autoencoder and no time embedding.

Picture and text are two streams with separate weights and joint attention; two blocks of the text
alone come before. The text is always padded to the same length, with a learned token that is
attended to like all others; text that is absent is padding alone. The network predicts the
picture. RoPE is over words for the text, and over rows and columns for the picture, which also has
added sinusoids.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.attention import Grid, attend_all, rope_table, rotate_halves
from mlx_snapgen.networks.base import velocity_to
from mlx_snapgen.networks.cached import bounded_cache
from mlx_snapgen.networks.exponentials import silu
from mlx_snapgen.networks.layers import (
    checkpointed,
    depth_to_space,
    merge_heads,
    space_to_depth,
    split,
    split_heads,
)
from mlx_snapgen.networks.rope import Rope, token_grid
from mlx_snapgen.presets import PIXELS
from mlx_snapgen.public_config import MiniT2ITransformerConfig

NOISE_SCALE = PIXELS.latents_std[0]
"""Pixels in [-1, 1] are this times the latents, whose noise has unit variance."""
THETA = 10000.0
EPS = 1e-6


@bounded_cache(16 * 2**20)
def joint_rope(text_tokens: int, grid: Grid, *, head_dim: int) -> Rope:
    """Cosines and sines (L + N, head_dim/2) of the words, then of the picture's tokens."""
    frequencies = THETA ** -(np.arange(head_dim // 2) / (head_dim // 2))
    words = np.arange(text_tokens)[:, None] * frequencies
    of_text = mx.array(np.cos(words), mx.float32), mx.array(np.sin(words), mx.float32)
    of_picture = rope_table(grid, head_dim, theta=THETA)
    cos, sin = (mx.concatenate([*pair]) for pair in zip(of_text, of_picture, strict=True))
    return cos, sin


@bounded_cache(16 * 2**20)
def positions(grid: Grid, dims: int) -> mx.array:
    """Sinusoids (N, dims): sines and cosines of the column, then of the row."""
    frequencies = THETA ** -(np.arange(dims // 4) / (dims // 4))
    rows, columns = np.divmod(np.arange(grid.height * grid.width), grid.width)
    angles = [axis[:, None] * frequencies for axis in (columns, rows)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return mx.array(np.concatenate(parts, axis=1), mx.float32)


class PatchEmbedder(nn.Module):
    """Patches (B, h, w, p * p * 3) -> (B, h, w, d), through a narrow projection."""

    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        packed = config.latent_channels * config.patch_size**2
        self.proj1 = nn.Linear(packed, config.patch_dims, bias=False)
        self.proj2 = nn.Linear(config.patch_dims, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj2(self.proj1(x))


class FeedForward(nn.Module):
    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        d, hidden = config.hidden_size, config.mlp_size
        self.w1 = nn.Linear(d, hidden, bias=False)
        self.w3 = nn.Linear(d, hidden, bias=False)
        self.w2 = nn.Linear(hidden, d, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class TextBlock(nn.Module):
    """A block of the text alone."""

    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        d = config.hidden_size
        self.norm1, self.norm2 = (nn.RMSNorm(d, eps=EPS) for _ in range(2))
        self.qkv, self.attn_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=EPS) for _ in range(2))
        self.mlp = FeedForward(config)
        self._head_dim = config.head_dim

    def __call__(self, text: mx.array, rope: Rope, *, save_memory: bool = False) -> mx.array:
        """(B, L, d) -> the same shape."""
        parts = split(self.qkv(self.norm1(text)), 3, axis=-1)
        q, k, v = (split_heads(part, self._head_dim) for part in parts)
        q, k = rotate_halves(self.q_norm(q), *rope), rotate_halves(self.k_norm(k), *rope)
        text = text + self.attn_proj(merge_heads(attend_all(q, k, v, save_memory=save_memory)))
        return text + self.mlp(self.norm2(text))


class JointBlock(nn.Module):
    """A block of both streams; q and k of both have the same norms."""

    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        d = config.hidden_size
        self.img_norm1, self.img_norm2 = (nn.RMSNorm(d, eps=EPS) for _ in range(2))
        self.txt_norm1, self.txt_norm2 = (nn.RMSNorm(d, eps=EPS) for _ in range(2))
        self.img_qkv, self.txt_qkv = nn.Linear(d, 3 * d), nn.Linear(d, 3 * d)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=EPS) for _ in range(2))
        self.img_attn_proj, self.txt_attn_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.img_mlp, self.txt_mlp = FeedForward(config), FeedForward(config)
        self._head_dim = config.head_dim

    def __call__(
        self, picture: mx.array, text: mx.array, *, rope: Rope, save_memory: bool = False
    ) -> tuple[mx.array, mx.array]:
        """picture (B, N, d), text (B, L, d) -> the same two shapes."""
        joined = [self.txt_qkv(self.txt_norm1(text)), self.img_qkv(self.img_norm1(picture))]
        parts = split(mx.concatenate(joined, axis=1), 3, axis=-1)
        q, k, v = (split_heads(part, self._head_dim) for part in parts)
        q, k = rotate_halves(self.q_norm(q), *rope), rotate_halves(self.k_norm(k), *rope)
        out, length = merge_heads(attend_all(q, k, v, save_memory=save_memory)), text.shape[1]
        picture = picture + self.img_attn_proj(out[:, length:])
        text = text + self.txt_attn_proj(out[:, :length])
        picture = picture + self.img_mlp(self.img_norm2(picture))
        return picture, text + self.txt_mlp(self.txt_norm2(text))


class FinalLayer(nn.Module):
    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        self.norm_final = nn.RMSNorm(config.hidden_size, eps=EPS)
        packed = config.latent_channels * config.patch_size**2
        self.linear = nn.Linear(config.hidden_size, packed)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self.norm_final(x))


class MiniT2ITransformer(nn.Module):
    """Velocity v = eps - x0 of pixels, in latents with noise of unit variance."""

    BLOCKS = ("txt_preamble_blocks", "double_blocks")
    """Path of the layers that may be quantized."""
    UNUSED = ("pooled_embedder",)
    """Layers of the public network that have no effect, but are in LoRAs of it."""

    def __init__(self, config: MiniT2ITransformerConfig):
        super().__init__()
        self.config = config
        self._checkpoint = False
        d = config.hidden_size
        self.img_embedder = PatchEmbedder(config)
        self.txt_embedder = nn.Linear(config.text_dims, d, bias=False)
        self.mask_token = mx.zeros((1, 1, config.text_dims))
        self.txt_preamble_blocks = [TextBlock(config) for _ in range(config.num_text_layers)]
        self.double_blocks = [JointBlock(config) for _ in range(config.num_layers)]
        self.final_layer = FinalLayer(config)

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """See `VelocityNetwork.checkpoint_blocks`."""
        self._checkpoint = enabled

    @property
    def dtype(self) -> mx.Dtype:
        """Floating type of the weights."""
        return self.mask_token.dtype

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        return_features: bool = False,
    ) -> Any:
        """See `VelocityNetwork.__call__`; t has no effect on the predicted picture.

        Text of more than `config.text_tokens` is cut.
        """
        config = self.config
        b, height, width, _ = x_t.shape
        grid = Grid(*token_grid(height, width, config.patch_size))
        rope = joint_rope(config.text_tokens, grid, head_dim=config.head_dim)
        cos, sin = (table.astype(self.dtype) for table in rope)
        h = self.txt_embedder(self._padded(text, mask))
        of_text = cos[: config.text_tokens], sin[: config.text_tokens]
        for block in self.txt_preamble_blocks:
            if self._checkpoint:
                h = checkpointed(block, {"text": h}, rope=of_text, save_memory=True)
            else:
                h = block(h, of_text)
        pixels = (NOISE_SCALE * x_t.astype(mx.float32)).astype(self.dtype)
        x = self.img_embedder(space_to_depth(pixels, config.patch_size))
        x = x.reshape(b, -1, config.hidden_size)
        x = x + positions(grid, config.hidden_size).astype(x.dtype)
        for block in self.double_blocks:
            inputs = {"picture": x, "text": h}
            if self._checkpoint:
                x, h = checkpointed(block, inputs, rope=(cos, sin), save_memory=True)
            else:
                x, h = block(**inputs, rope=(cos, sin))
        found = self.final_layer(x).astype(mx.float32).reshape(b, grid.height, grid.width, -1)
        x0 = depth_to_space(found, config.patch_size) / NOISE_SCALE
        v = velocity_to(x0, x_t, t)
        return (v, x.astype(x_t.dtype)) if return_features else v

    def _padded(self, text: mx.array, mask: mx.array | None) -> mx.array:
        """States (B, `text_tokens`, D), with the learned token where no text counts."""
        most = self.config.text_tokens
        text = text[:, :most].astype(self.dtype)
        b, length, _ = text.shape
        counts = mx.ones((b, length), mx.bool_) if mask is None else mask[:, :most]
        fill = (0, most - length)
        text = mx.pad(text, [(0, 0), fill, (0, 0)])
        counts = mx.pad(counts.astype(mx.bool_), [(0, 0), fill])
        return mx.where(counts[..., None], text, self.mask_token)
