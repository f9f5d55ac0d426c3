"""Layers that several networks share."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen._interrupts import find_compiler
from mlx_snapgen.networks.exponentials import exponential_weights, float32_on_cpu
from mlx_snapgen.networks.parallel import at_once, part_count
from mlx_snapgen.networks.products import pictures_apart

find_compiler()


@mx.compile
def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """adaLN: x (B, N, d) by shift and scale (B, 1, d)."""
    return x * (1 + scale) + shift


def layer_norm(x: mx.array) -> mx.array:
    """LayerNorm without affine parameters, which the modulation replaces."""
    return mx.fast.layer_norm(x, None, None, 1e-6)


def sinusoids(t: mx.array, dims: int) -> mx.array:
    """t (B,) in [0, 1] -> (B, dims) in float32: cosines, then sines, of 1000 t."""
    half = dims // 2
    frequencies = mx.exp(-math.log(10000) * mx.arange(half) / half)
    angles = 1000 * t.astype(mx.float32)[:, None] * frequencies
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def flat_parameters(tree: Any) -> dict[str, mx.array]:
    """Dotted name -> array, of a module's parameters or of any nested ones, such as gradients."""
    return dict(tree_flatten(tree.parameters() if isinstance(tree, nn.Module) else tree))


def checkpointed(block: nn.Module, inputs: Mapping[str, Any], **settings: Any) -> Any:
    """block(**inputs, **settings), recomputed in the backward pass instead of stored.

    Gradients reach the arrays in `inputs`, which may be nested, and the block's trainable
    parameters. `nn.utils.checkpoint` saves no memory here: with lazy evaluation, the input
    gradients of all blocks are computed first, and every block's activations are kept for its
    weight gradients. Here a block is recomputed only when its output gradient is available, and its
    input gradient is passed on only when its weight gradients are computed.
    """
    arrays, trained = flat_parameters(inputs), flat_parameters(block.trainable_parameters())
    count = len(arrays)

    def forward(*primals: mx.array) -> Any:
        given = tree_unflatten(list(zip(arrays, primals[:count], strict=True)))
        block.update(tree_unflatten(list(zip(trained, primals[count:], strict=True))))
        out = block(**given, **settings)
        block.update(tree_unflatten(list(trained.items())))
        return out

    run = mx.custom_function(forward)

    @run.vjp
    def backward(primals, cotangents, _):
        cotangents = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
        _, grads = mx.vjp(forward, mx.depends(list(primals), cotangents), cotangents)
        return (*mx.depends(grads[:count], grads[count:]), *grads[count:])

    return run(*arrays.values(), *trained.values())


def split(x: mx.array, at: int | Sequence[int], *, axis: int) -> list[mx.array]:
    """`mx.split` for networks: a compiled step may compute the same network twice.

    `mx.compile` merges equal operations, and fails with `_Map_base::at` on two equal splits of a
    computed array (MLX 0.32.4). It does not merge `mx.depends`, which copies no data.
    """
    [x] = mx.depends([x], [])
    return list(mx.split(x, at, axis=axis))


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    b, n, _ = x.shape
    return x.reshape(b, n, -1, head_dim).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, heads, N, head_dim) -> (B, N, heads * head_dim)."""
    b, heads, n, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, n, heads * head_dim)


PART_OF_SCORES = 1 << 19
"""Attention scores that the CPU computes at a time, about: 2 MiB in float32 stay in its cache."""


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: mx.array | None = None,
    modulation: mx.array | None = None,
) -> mx.array:
    """Softmax attention with scale 1/sqrt(head_dim); kv heads are shared in order (GQA).

    `mask`, boolean and such as (B, 1, 1, keys), is true where a key counts. `modulation` (queries,
    keys) multiplies the attention weights after the softmax; they are not normalized again (EDT).
    """
    scale = 1 / math.sqrt(q.shape[-1])
    if float32_on_cpu(q):
        return _attend_apart(q * scale, k, v, mask=mask, modulation=modulation)
    if modulation is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    share = q.shape[1] // k.shape[1]
    k, v = mx.repeat(k, share, axis=1), mx.repeat(v, share, axis=1)
    scores = q @ k.swapaxes(-1, -2) * scale
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    weights = mx.softmax(scores, axis=-1)
    return (weights * modulation.astype(q.dtype)) @ v


def _attend_apart(
    q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | None, modulation: mx.array | None
) -> mx.array:
    """`_attend_in_cache` of a batch of pictures, each with the parts that it has alone."""
    (b, heads, n, dim), keys, count = q.shape, k.shape[2], pictures_apart()
    rows = max(16, PART_OF_SCORES // (b // count * heads * keys))
    rows = min(rows, math.ceil(n / part_count(2 * heads * n * keys * dim)))
    size = max(1, PART_OF_SCORES // (heads * n * keys)) if count > 1 else b
    out = []
    for start in range(0, b, size):
        here = slice(start, start + size)
        own = mask[here] if mask is not None and mask.ndim == 4 and len(mask) == b else mask
        out.append(
            _attend_in_cache(q[here], k[here], v[here], rows=rows, mask=own, modulation=modulation)
        )
    return mx.concatenate(out) if len(out) > 1 else out[0]


def _attend_in_cache(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    rows: int,
    mask: mx.array | None,
    modulation: mx.array | None,
) -> mx.array:
    """`attend` as it runs on the CPU, for q that is scaled, `rows` queries at a time.

    The query heads of one kv head are one product, so that k and v are not copied. The weights are
    divided by their sums after the product with v, which has fewer numbers.
    """
    b, heads, n, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    share = heads // kv_heads
    k = k.swapaxes(-1, -2)
    starts = range(0, n, rows)

    def attended(start: int, part: mx.array) -> mx.array:
        here = slice(start, start + rows)
        count = part.shape[2]
        by_head = (b, heads, count, keys)
        by_kv_head = (b, kv_heads, share * count, keys)
        scores = part.reshape(b, kv_heads, share * count, head_dim) @ k
        if mask is not None:
            own = mask[..., here, :] if mask.shape[-2] > 1 else mask
            scores = mx.where(own, scores.reshape(by_head), -1e9).reshape(by_kv_head)
        weights, total = exponential_weights(scores)
        if modulation is not None:
            weights = (weights.reshape(by_head) * modulation[here]).reshape(by_kv_head)
        return ((weights @ v) / total).reshape(b, heads, count, head_dim)

    parts = zip(starts, split(q, starts[1:], axis=2), strict=True)
    return mx.concatenate(at_once([partial(attended, *part) for part in parts]), axis=2)


def space_to_depth(x: mx.array, factor: int) -> mx.array:
    """(B, H, W, C) -> (B, H/f, W/f, f*f*C), cells in row-major order, channels innermost."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: mx.array, factor: int) -> mx.array:
    """Inverse of `space_to_depth`: (B, H, W, f*f*C) -> (B, H*f, W*f, C)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def pack(x: mx.array, patch: int) -> mx.array:
    """(B, H, W, C) -> tokens (B, H/p * W/p, C*p*p), channels outermost."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, (h // patch) * (w // patch), c * patch**2)


def unpack(tokens: mx.array, grid: tuple[int, int], *, patch: int) -> mx.array:
    """Inverse of `pack`, for a grid of (rows, columns) of tokens."""
    (h, w), b = grid, tokens.shape[0]
    x = tokens.reshape(b, h, w, -1, patch, patch).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * patch, w * patch, -1)
