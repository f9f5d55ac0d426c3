"""Attention of the Efficient DiT in PyTorch: RoPE, bands, ASSA and cross-attention.

Attention has two implementations: `attend_fused` for PyTorch, `attend_split` for Core ML.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert.pytorch.layers import LayerNorm, keys_of, linear, split_heads, tokens
from mlx_snapgen.config import TransformerConfig


class Bands(NamedTuple):
    """Bands of blockwise neighborhood attention, in tokens."""

    size: int
    """Queries in each band; the last may have fewer."""
    seen: tuple[tuple[int, int], ...]
    """First key of each band, and the first key after it."""


class Grid(nn.Module):
    """A grid of tokens with its RoPE tables (1, 1, head_dim/2, N) and bands.

    A token of stride s is at the center of the s x s finest tokens that it covers.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig, height: int, width: int, stride: int):
        super().__init__()
        self.height, self.width, self.tokens = height, width, height * width
        quarter = config.head_dim // 4
        frequencies = config.rope_theta ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        rows, columns = (
            (torch.arange(n, dtype=torch.float64) * stride + (stride - 1) / 2)
            * frequencies[:, None]
            for n in (height, width)
        )
        shape = (quarter, height, width)
        angles = torch.cat([rows[:, :, None].expand(shape), columns[:, None].expand(shape)])
        angles = angles.reshape(1, 1, 2 * quarter, self.tokens)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        size, reach = math.ceil(height / config.num_bands) * width, config.band_radius
        starts = range(0, self.tokens, size)
        self.bands = Bands(
            size,
            tuple(
                (max(0, start - reach * size), min(self.tokens, start + (reach + 1) * size))
                for start in starts
            ),
        )

    def rotate(self, x: Tensor) -> Tensor:
        """RoPE of x (B, heads, head_dim, N)."""
        a, b = x.chunk(2, 2)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], 2)

    def picture(self, x: Tensor) -> Tensor:
        """Tokens (B, C, 1, N) -> (B, C, H, W)."""
        return x.reshape(x.shape[0], x.shape[1], self.height, self.width)


class Attend(Protocol):
    """Softmax attention with scale 1/sqrt(D).

    Args:
        q: (B, heads * D, 1, Nq).
        k: (B, Nk, kv_heads, D).
        v: (B, kv_heads * D, 1, Nk).
        kv_of: the kv head of each query head.
        bands: None lets every query attend to every key.
        bias: (B, Nk, 1, 1), added to the scores.

    Returns:
        (B, heads * D, 1, Nq)
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        kv_of: Sequence[int],
        bands: Bands | None = None,
        bias: Tensor | None = None,
    ) -> Tensor: ...


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_of: Sequence[int],
    bands: Bands | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention through PyTorch's own kernels (see `Attend`)."""
    shared = torch.tensor(kv_of, device=q.device)
    q = split_heads(q, len(kv_of)).transpose(2, 3)
    v = split_heads(v, k.shape[2]).transpose(2, 3)[:, shared]
    k = k.transpose(1, 2)[:, shared]
    if bands is None:
        mask = None if bias is None else bias.permute(0, 2, 3, 1)
        out = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        parts = [
            F.scaled_dot_product_attention(band, k[:, :, first:end], v[:, :, first:end])
            for band, (first, end) in zip(q.split(bands.size, 2), bands.seen, strict=True)
        ]
        out = torch.cat(parts, 2)
    return out.transpose(2, 3).reshape(q.shape[0], -1, 1, q.shape[2])


def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_of: Sequence[int],
    bands: Bands | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention head by head and without a reshape, for Core ML (see `Attend`)."""
    head_dim = k.shape[3]
    # Keys and values of each band, for each kv head.
    pairs = [
        [(k[:, a:b], v[..., a:b]) for a, b in bands.seen] if bands else [(k, v)]
        for k, v in zip(k.split(1, 2), v.split(head_dim, 1), strict=True)
    ]
    out = []
    for head, kv in zip((q * head_dim**-0.5).split(head_dim, 1), kv_of, strict=True):
        parts = head.split(bands.size, 3) if bands else [head]
        made = [
            _attend_one(part, *pair, bias=bias) for part, pair in zip(parts, pairs[kv], strict=True)
        ]
        out.append(torch.cat(made, 3) if bands else made[0])
    return torch.cat(out, 1)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """One head: q (B, D, 1, Nq) scaled, k (B, Nk, 1, D), v (B, D, 1, Nk) -> (B, D, 1, Nq)."""
    scores = torch.einsum("bkhc,bchq->bkhq", k, q)
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bchk,bkhq->bchq", v, scores.softmax(1))


class SelfAttention(nn.Module):
    """Grouped-query self-attention with QK LayerNorm and 2-D RoPE over a whole grid."""

    def __init__(self, config: TransformerConfig, attend: Attend):
        super().__init__()
        d, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        kv = kv_heads * config.head_dim
        self.q_proj, self.out_proj = linear(d, d), linear(d, d)
        self.k_proj, self.v_proj = linear(d, kv), linear(d, kv)
        self.q_norm = LayerNorm(config.head_dim, dim=2)
        self.k_norm = LayerNorm(config.head_dim, dim=2)
        self.heads, self.kv_heads, self.attend = heads, kv_heads, attend
        self.kv_of = [head * kv_heads // heads for head in range(heads)]

    def project(self, h: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, d, 1, N) rotated, k (B, kv_heads, D, N) not yet, v (B, kv_heads * D, 1, N)."""
        q = self.q_norm(split_heads(self.q_proj(h), self.heads))
        k = self.k_norm(split_heads(self.k_proj(h), self.kv_heads))
        return grid.rotate(q).reshape(h.shape), k, self.v_proj(h)

    def forward(self, h: Tensor, grid: Grid, cells: Grid | None) -> Tensor:
        q, k, v = self.project(h, grid)
        k = grid.rotate(k).permute(0, 3, 1, 2)
        return self.out_proj(self.attend(q, k, v, kv_of=self.kv_of))


class SparseSelfAttention(SelfAttention):
    """Adaptive sparse self-attention, ASSA (SnapGen++ section 3.1).

    A global branch over keys and values compressed 2x2 (eq. 1) and blockwise neighborhood
    attention (eqs. 2-3), mixed per head and token.
    """

    def __init__(self, config: TransformerConfig, attend: Attend):
        super().__init__(config, attend)
        kv = self.kv_heads * config.head_dim
        self.k_compress = nn.Conv2d(kv, kv, 2, stride=2, bias=False)
        self.v_compress = nn.Conv2d(kv, kv, 2, stride=2, bias=False)
        self.mix_proj = linear(config.hidden_size, self.heads)

    def forward(self, h: Tensor, grid: Grid, cells: Grid | None) -> Tensor:
        assert cells is not None
        q, k, v = self.project(h, grid)
        flat = k.reshape(v.shape)
        k_cells = split_heads(tokens(self.k_compress(grid.picture(flat))), self.kv_heads)
        v_cells = tokens(self.v_compress(grid.picture(v)))
        k, k_cells = grid.rotate(k).permute(0, 3, 1, 2), cells.rotate(k_cells).permute(0, 3, 1, 2)
        out_global = self.attend(q, k_cells, v_cells, kv_of=self.kv_of)
        out_local = self.attend(q, k, v, kv_of=self.kv_of, bands=grid.bands)
        # One weight per head and token: (B, heads, 1, N) -> (B, d, 1, N)
        mix = torch.sigmoid(self.mix_proj(h))
        mix = mix.expand(-1, -1, h.shape[1] // self.heads, -1).reshape(h.shape)
        return self.out_proj(out_local + mix * (out_global - out_local))


class CrossAttention(nn.Module):
    """Attention from picture tokens to text tokens; query head i reads kv head i mod kv_heads.

    `present` (B, 1, 1, 1) is 1, or 0 for a picture whose text is absent; so is the output.
    """

    def __init__(self, config: TransformerConfig, attend: Attend):
        super().__init__()
        d, kv = config.hidden_size, config.num_cross_kv_heads * config.head_dim
        self.q_proj, self.out_proj = linear(d, d), linear(d, d)
        self.k_proj, self.v_proj = linear(config.text_width, kv), linear(config.text_width, kv)
        self.kv_heads, self.attend = config.num_cross_kv_heads, attend
        self.kv_of = [head % self.kv_heads for head in range(config.num_heads)]

    def forward(
        self, x: Tensor, text: Tensor, bias: Tensor | None, present: Tensor | None
    ) -> Tensor:
        k = keys_of(self.k_proj(text), self.kv_heads)
        out = self.out_proj(
            self.attend(self.q_proj(x), k, self.v_proj(text), kv_of=self.kv_of, bias=bias)
        )
        return out if present is None else present * out
