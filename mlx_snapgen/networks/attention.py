"""Attention of the Efficient DiT: 2-D RoPE, dense, blockwise neighborhood, ASSA, and cross.

Shapes: h is (B, N, d) with the N = H * W tokens of a grid in raster order; q, k and v are
(B, heads, tokens, head_dim). In grouped-query attention the ratio of query to kv heads is the same
at all widths, so a query head has the same kv head at every width that contains it.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.networks.cached import bounded_cache
from mlx_snapgen.networks.elastic import ElasticLinear, PerWidth
from mlx_snapgen.networks.layers import attend, merge_heads, split, split_heads
from mlx_snapgen.networks.parallel import at_once, by_tokens

MANY_SCORES = 2**24
"""Attention scores of a batch from which on `--save-memory` computes them again."""
PART_SCORES = 2**22
"""Scores of a batch that are in memory at a time then, about."""

Parts = Sequence[tuple[slice, slice]]
"""Slices of the queries, which follow one another, and of the keys that they attend to."""


class Grid(NamedTuple):
    """A token grid. `stride` is the distance of neighboring tokens in finest-grid tokens."""

    height: int
    width: int
    stride: int = 1

    def halved(self) -> "Grid":
        """The grid of its 2x2 cells."""
        return Grid(self.height // 2, self.width // 2, self.stride * 2)


@bounded_cache(16 * 2**20)
def rope_table(grid: Grid, head_dim: int, *, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines (N, head_dim/2) of 2-D rotary positions: rows first, then columns.

    A token of stride s is at the center of the s x s finest tokens that it covers, so the key of a
    2x2 cell is rotated to the center of the cell.
    """
    frequencies = theta ** -(np.arange(head_dim // 4) / (head_dim // 4))
    rows, columns = (
        (np.arange(n) * grid.stride + (grid.stride - 1) / 2)[:, None] * frequencies
        for n in (grid.height, grid.width)
    )
    shape = (grid.height, grid.width, head_dim // 4)
    angles = np.concatenate(
        [np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns[None], shape)], axis=-1
    ).reshape(grid.height * grid.width, head_dim // 2)
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


@mx.compile
def rotate_halves(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, heads, N, D) by cos and sin (N, D/2)."""
    x1, x2 = split(x, 2, axis=-1)
    return mx.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def apply_rope(x: mx.array, grid: Grid, *, theta: float) -> mx.array:
    """Rotate x (B, heads, N, head_dim) to the positions of `grid`."""
    cos, sin = rope_table(grid, x.shape[-1], theta=theta)
    return rotate_halves(x, cos.astype(x.dtype), sin.astype(x.dtype))


@bounded_cache(128 * 2**20)
def modulation_matrix(queries: Grid, keys: Grid) -> mx.array:
    """EDT's attention modulation matrix (arXiv 2410.23788): (query tokens, key tokens).

    M = exp(cos(2 pi d / T)) / 2 with T = 4 sqrt(2) (n - 1), and 0 beyond R = sqrt((n - 1)^2 + 4).
    d is the distance of the tokens' centers in finest-grid tokens, n the longer side of the query
    grid. At 1024 px the matrix takes 64 MiB, and 16 MiB for keys of 2x2 cells.
    """

    def centers(count: int, stride: int) -> np.ndarray:
        return np.arange(count) * stride + (stride - 1) / 2

    rows, columns = (
        centers(a, queries.stride)[:, None] - centers(b, keys.stride)
        for a, b in ((queries.height, keys.height), (queries.width, keys.width))
    )
    squared = rows[:, None, :, None] ** 2 + columns[None, :, None, :] ** 2
    distance = np.sqrt(squared).reshape(queries.height * queries.width, -1)
    n = max(queries.height, queries.width)
    period, reach = 4 * math.sqrt(2) * (n - 1), math.sqrt((n - 1) ** 2 + 4)
    matrix = 0.5 * np.exp(np.cos(2 * np.pi * distance / period))
    return mx.array(np.where(distance > reach, 0, matrix), mx.float32)


def attend_all(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: mx.array | None = None,
    modulation: mx.array | None = None,
    save_memory: bool = False,
) -> mx.array:
    """`attend`, with `save_memory` and many scores by `attend_in_parts`."""
    b, heads, n, _ = q.shape
    if not save_memory or b * heads * n * k.shape[2] < MANY_SCORES:
        return attend(q, k, v, mask=mask, modulation=modulation)
    parts = [(slice(0, n), slice(0, k.shape[2]))]
    return attend_in_parts(q, k, v, parts=parts, mask=mask, modulation=modulation)


def attend_in_parts(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    parts: Parts,
    mask: mx.array | None = None,
    modulation: mx.array | None = None,
) -> mx.array:
    """Attention part after part, which does not keep the scores for the backward pass.

    MLX keeps them on all devices. Here the backward pass computes those of a part again, and each
    part waits for the one before, because otherwise the scores of all would exist at once. The
    gradients are the same except for rounding. `parts` are cut to `PART_SCORES`.
    """
    b, heads, _, _ = q.shape
    parts = [part for queries, keys in parts for part in _cut(queries, keys, count=b * heads)]

    def one(queries: slice, keys: slice):
        weights = None if modulation is None else modulation[queries, keys]
        return lambda q, k, v: attend(q, k, v, mask=mask, modulation=weights)

    @mx.custom_function
    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        out: list[mx.array] = []
        for queries, keys in parts:
            part = mx.depends([q[:, :, queries], k[:, :, keys], v[:, :, keys]], out[-1:])
            out.append(one(queries, keys)(*part))
        return mx.concatenate(out, axis=2)

    @run.vjp
    def backward(primals, cotangent, _):
        q, k, v = primals
        d_q: list[mx.array] = []
        d_k, d_v = (mx.zeros(x.shape, mx.float32) for x in (k, v))
        for queries, keys in parts:
            part = [q[:, :, queries], k[:, :, keys], v[:, :, keys], cotangent[:, :, queries]]
            *part, d_out = mx.depends(part, [*d_q[-1:], d_k, d_v])
            _, grads = mx.vjp(one(queries, keys), part, [d_out])
            d_q.append(grads[0])
            d_k = d_k.at[:, :, keys].add(grads[1].astype(mx.float32))
            d_v = d_v.at[:, :, keys].add(grads[2].astype(mx.float32))
        return mx.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype)

    return run(q, k, v)  # pyright: ignore[reportReturnType]  no types in mlx


def _cut(queries: slice, keys: slice, *, count: int) -> Parts:
    """Parts of `queries` with about `PART_SCORES` scores of `count` heads."""
    size = max(64, PART_SCORES // (count * (keys.stop - keys.start)) // 64 * 64)
    starts = range(queries.start, queries.stop, size)
    return [(slice(start, min(start + size, queries.stop)), keys) for start in starts]


def neighborhood_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    grid: Grid,
    num_bands: int,
    radius: int,
    modulation: mx.array | None = None,
    save_memory: bool = False,
) -> mx.array:
    """Blockwise neighborhood attention, BNA (eqs. 2-3).

    The rows of the grid are cut into bands of ceil(H / num_bands) rows, the last one shorter where
    they do not divide. Band b attends to bands b - radius .. b + radius that exist.

    On Metal and CUDA all bands with a full neighborhood go into one batched call, because launches
    are expensive there; on the CPU a loop over bands is as fast and needs less memory.
    `save_memory` is that of `attend_all`.
    """
    band = math.ceil(grid.height / num_bands) * grid.width
    b, heads, n, _ = q.shape
    if save_memory and b * heads * n * min(n, (2 * radius + 1) * band) >= MANY_SCORES:
        return attend_in_parts(q, k, v, parts=bands(n, band, radius=radius), modulation=modulation)
    if modulation is None and mx.default_device().type == mx.DeviceType.gpu:
        return bands_batched(q, k, v, band=band, radius=radius)
    return bands_looped(q, k, v, band=band, radius=radius, modulation=modulation)


def bands(tokens: int, band: int, *, radius: int) -> Parts:
    """The bands of `band` tokens; each attends to `radius` bands on both sides."""
    return [
        (
            slice(start, min(start + band, tokens)),
            slice(max(0, start - radius * band), min(start + (radius + 1) * band, tokens)),
        )
        for start in range(0, tokens, band)
    ]


def bands_looped(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    band: int,
    radius: int,
    modulation: mx.array | None = None,
) -> mx.array:
    """BNA band by band; `band` is the number of tokens in a band."""

    def attended(here: slice, near: slice) -> mx.array:
        weights = None if modulation is None else modulation[here, near]
        return attend(q[:, :, here], k[:, :, near], v[:, :, near], modulation=weights)

    parts = bands(q.shape[2], band, radius=radius)
    return mx.concatenate(at_once([partial(attended, *part) for part in parts]), axis=2)


def bands_batched(q: mx.array, k: mx.array, v: mx.array, *, band: int, radius: int) -> mx.array:
    """BNA with the inner bands, which attend to 2 * radius + 1 whole bands each, as one batch."""
    b, heads, n, head_dim = q.shape
    span = 2 * radius + 1
    inner = n // band - 2 * radius
    if inner < 2:
        return bands_looped(q, k, v, band=band, radius=radius)

    def windows(x: mx.array) -> mx.array:
        """(B, heads, N, D) -> (B * inner, heads, span * band, D), overlapping."""
        shifted = [x[:, :, i * band : (i + inner) * band] for i in range(span)]
        x = mx.stack(shifted, axis=2).reshape(b, x.shape[1], span, inner, band, head_dim)
        x = x.transpose(0, 3, 1, 2, 4, 5)
        return x.reshape(b * inner, x.shape[2], span * band, head_dim)

    first, last = radius * band, (radius + inner) * band
    q_inner = q[:, :, first:last].reshape(b, heads, inner, band, head_dim)
    q_inner = q_inner.transpose(0, 2, 1, 3, 4).reshape(b * inner, heads, band, head_dim)
    out = attend(q_inner, windows(k), windows(v))
    out = out.reshape(b, inner, heads, band, head_dim).transpose(0, 2, 1, 3, 4)
    parts = [out.reshape(b, heads, inner * band, head_dim)]
    for start in reversed(range(0, first, band)):
        near = slice(0, start + (radius + 1) * band)
        parts.insert(0, attend(q[:, :, start : start + band], k[:, :, near], v[:, :, near]))
    for start in range(last, n, band):
        near = slice(start - radius * band, n)
        parts.append(attend(q[:, :, start : start + band], k[:, :, near], v[:, :, near]))
    return mx.concatenate(parts, axis=2)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with QK LayerNorm and 2-D RoPE over a whole grid."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, head_dim = config.hidden_size, config.head_dim
        kv = config.num_kv_heads * head_dim
        # A single kv head (multi-query attention) is shared by all widths.
        slice_kv = config.num_kv_heads > 1
        self.q_proj = ElasticLinear(d, d)
        self.k_proj = ElasticLinear(d, kv, slice_out=slice_kv)
        self.v_proj = ElasticLinear(d, kv, slice_out=slice_kv)
        self.out_proj = ElasticLinear(d, d)
        self.q_norm = PerWidth(config.widths, lambda _: nn.LayerNorm(head_dim))
        self.k_norm = PerWidth(config.widths, lambda _: nn.LayerNorm(head_dim))
        self._head_dim, self._theta = head_dim, config.rope_theta

    def project(self, h: mx.array, share: float) -> tuple[mx.array, mx.array, mx.array]:
        """h (B, N, d) -> q, k, v by heads, q and k normalized but not yet rotated."""

        def projected(h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            q = split_heads(self.q_proj(h, share), self._head_dim)
            k = split_heads(self.k_proj(h, share), self._head_dim)
            v = split_heads(self.v_proj(h, share), self._head_dim)
            return self.q_norm(q, share=share), self.k_norm(k, share=share), v

        return by_tokens(projected, h)

    def __call__(
        self,
        h: mx.array,
        grid: Grid,
        *,
        share: float = 1.0,
        modulate: bool = False,
        save_memory: bool = False,
    ) -> mx.array:
        """h (B, N, d) on `grid` -> the same shape.

        `modulate` applies EDT's matrix; `save_memory` is that of `attend_all`.
        """
        q, k, v = self.project(h, share)
        q, k = apply_rope(q, grid, theta=self._theta), apply_rope(k, grid, theta=self._theta)
        matrix = modulation_matrix(grid, grid) if modulate else None
        out = attend_all(q, k, v, modulation=matrix, save_memory=save_memory)
        return self.out_proj(merge_heads(out), share)


class SparseSelfAttention(SelfAttention):
    """Adaptive sparse self-attention, ASSA (SnapGen++ section 3.1).

    A global branch over 2x2-compressed keys and values (eq. 1) and a local branch (BNA, eqs. 2-3)
    share q, k and v; each head mixes them per token with a sigmoid weight computed from the input.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        kv = config.num_kv_heads * config.head_dim
        sliced = config.num_kv_heads > 1
        self.k_compress = _compression(kv, sliced)
        self.v_compress = _compression(kv, sliced)
        self.mix_proj = ElasticLinear(config.hidden_size, config.num_heads)
        self._num_bands, self._radius = config.num_bands, config.band_radius

    def compress(
        self, x: mx.array, grid: Grid, *, projection: ElasticLinear, share: float
    ) -> mx.array:
        """2x2 convolution with stride 2 over the grid: (B, heads, N, D) -> (B, heads, N/4, D)."""
        b, heads, _, dim = x.shape
        rows, columns = grid.height // 2, grid.width // 2
        x = x.reshape(b, heads, rows, 2, columns, 2, dim).transpose(0, 2, 4, 3, 5, 1, 6)
        x = projection(x.reshape(b, rows * columns, 4 * heads * dim), share)
        return split_heads(x, dim)

    def __call__(
        self,
        h: mx.array,
        grid: Grid,
        *,
        share: float = 1.0,
        modulate: bool = False,
        save_memory: bool = False,
    ) -> mx.array:
        """h (B, N, d) on `grid` -> the same shape.

        `modulate` applies EDT's matrix; `save_memory` is that of `attend_all`.
        """
        q, k, v = self.project(h, share)
        cells = grid.halved()
        near = modulation_matrix(grid, grid) if modulate else None
        far = modulation_matrix(grid, cells) if modulate else None
        k_cells = self.compress(k, grid, projection=self.k_compress, share=share)
        v_cells = self.compress(v, grid, projection=self.v_compress, share=share)
        q, k = apply_rope(q, grid, theta=self._theta), apply_rope(k, grid, theta=self._theta)
        k_cells = apply_rope(k_cells, cells, theta=self._theta)
        out_global = attend_all(q, k_cells, v_cells, modulation=far, save_memory=save_memory)
        out_local = neighborhood_attention(
            q,
            k,
            v,
            grid=grid,
            num_bands=self._num_bands,
            radius=self._radius,
            modulation=near,
            save_memory=save_memory,
        )
        # (B, N, heads) -> (B, heads, N, 1)
        mix = mx.sigmoid(self.mix_proj(h, share)).transpose(0, 2, 1)[..., None]
        out = out_local + mix * (out_global - out_local)
        return self.out_proj(merge_heads(out), share)


def _compression(kv: int, sliced: bool) -> ElasticLinear:
    """A 2x2 stride-2 convolution over kv channels, initialized to the mean of the cell."""
    layer = ElasticLinear(4 * kv, kv, bias=False, in_groups=4, slice_in=sliced, slice_out=sliced)
    layer.weight = mx.tile(mx.eye(kv) / 4, (1, 4))
    return layer


class CrossAttention(nn.Module):
    """Attention from picture tokens to text tokens.

    The kv projections are never sliced. Query head i attends to kv head i mod num_kv_heads. This is
    the same at every width, because narrower widths drop query heads from the end.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, head_dim = config.hidden_size, config.head_dim
        self._num_kv_heads, self._head_dim = config.num_cross_kv_heads, head_dim
        kv = config.num_cross_kv_heads * head_dim
        self.q_proj = ElasticLinear(d, d)
        self.k_proj = ElasticLinear(config.text_width, kv, slice_in=False, slice_out=False)
        self.v_proj = ElasticLinear(config.text_width, kv, slice_in=False, slice_out=False)
        self.out_proj = ElasticLinear(d, d)
        self.out_proj.weight = mx.zeros_like(self.out_proj.weight)

    def __call__(
        self,
        h: mx.array,
        text: mx.array,
        *,
        mask: mx.array | None = None,
        share: float = 1.0,
        save_memory: bool = False,
    ) -> mx.array:
        """h (B, N, d), text (B, L, text_width), mask (B, L) true where a token counts.

        The output is 0 for a picture without any token that counts. `save_memory` is that of
        `attend_all`.
        """
        present = None
        if mask is not None:
            present = mask.any(axis=1, keepdims=True)
            # Let absent text attend to all tokens: attention to none may be NaN, also as gradient.
            mask = (mask | ~present)[:, None, None]
        q = split_heads(self.q_proj(h, share), self._head_dim)
        k = split_heads(self.k_proj(text), self._head_dim)
        v = split_heads(self.v_proj(text), self._head_dim)
        b, heads, n, head_dim = q.shape
        kv_heads = min(heads, self._num_kv_heads)
        k, v = k[:, :kv_heads], v[:, :kv_heads]
        # Make the heads that share a kv head adjacent: i mod kv_heads becomes the outer axis.
        q = q.reshape(b, heads // kv_heads, kv_heads, n, head_dim).swapaxes(1, 2)
        q = q.reshape(b, heads, n, head_dim)
        out = attend_all(q, k, v, mask=mask, save_memory=save_memory)
        out = out.reshape(b, kv_heads, heads // kv_heads, n, head_dim).swapaxes(1, 2)
        out = self.out_proj(merge_heads(out.reshape(b, heads, n, head_dim)), share)
        return out if present is None else mx.where(present[..., None], out, 0)
