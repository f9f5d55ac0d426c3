"""Layers that several networks share.

GELU here is fast on every backend. MLX computes tanh and exp on the CPU one element at a time,
which makes GELU cost more than the matrix products around it. There, exp(x) is written as repeated
squaring of a short series, plain arithmetic that the compiler turns into vector instructions: five
times faster, with an absolute error below 1e-5. Metal and CUDA use MLX's GELU.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

_C = 0.7978845608028654  # sqrt(2 / pi)


def gelu(x: mx.array) -> mx.array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), element-wise."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return cpu_gelu(x)  # pyright: ignore[reportReturnType]  mx.custom_function has no types
    return nn.gelu_approx(x)


def _sigmoid(z: mx.array) -> mx.array:
    # exp(-z) = exp(-z / 256) ^ 256, the small exponential by its series to fourth order
    r = mx.clip(z, -30.0, 30.0) * (-1 / 256)
    p = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24))))
    for _ in range(8):
        p = p * p
    return 1 / (1 + p)


@mx.compile
def _value(x: mx.array) -> mx.array:
    return x * _sigmoid(2 * _C * (x + 0.044715 * x * x * x))


@mx.compile
def _gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    x = mx.clip(x, -12.0, 12.0)  # beyond, the slope is 0 or 1 in float32
    s = _sigmoid(2 * _C * (x + 0.044715 * x * x * x))
    return cotangent * (s + x * s * (1 - s) * (2 * _C * (1 + 0.134145 * x * x)))


@mx.custom_function
def cpu_gelu(x: mx.array) -> mx.array:
    """`gelu` as it runs on the CPU."""
    return _value(x)


@cpu_gelu.vjp
def _cpu_gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return _gradient(x, cotangent)


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


def split_heads(x: mx.array, head_dim: int) -> mx.array:
    """(B, N, heads * head_dim) -> (B, heads, N, head_dim)."""
    b, n, _ = x.shape
    return x.reshape(b, n, -1, head_dim).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, heads, N, head_dim) -> (B, N, heads * head_dim)."""
    b, heads, n, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, n, heads * head_dim)


MOST_SCORES = 1 << 27
"""Attention scores from which the CPU computes them in parts: 512 MiB in float32."""


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: mx.array | None = None,
    modulation: mx.array | None = None,
) -> mx.array:
    """Softmax attention with scale 1/sqrt(head_dim); kv heads are shared in order (GQA).

    `modulation` (queries, keys) multiplies the attention weights after the softmax; they are not
    normalized again (EDT).
    """
    if modulation is not None:
        share = q.shape[1] // k.shape[1]
        k, v = mx.repeat(k, share, axis=1), mx.repeat(v, share, axis=1)
        weights = mx.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), axis=-1)
        return (weights * modulation.astype(q.dtype)) @ v
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if on_cpu and math.prod(q.shape[:3]) * k.shape[2] >= MOST_SCORES:
        return _attend_by_queries(q, k, v, mask=mask)
    return mx.fast.scaled_dot_product_attention(
        q, k, v, scale=1 / math.sqrt(q.shape[-1]), mask=mask
    )


def _attend_by_queries(q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | None) -> mx.array:
    """`attend` in parts, one after the other, because MLX has all scores in memory on the CPU."""
    size = max(1, MOST_SCORES // 4 // (q.shape[0] * q.shape[1] * k.shape[2]))
    out: list[mx.array] = []
    for start in range(0, q.shape[2], size):
        here = slice(start, start + size)
        [part] = mx.depends([q[:, :, here]], out[-1:])
        own = mask[..., here, :] if mask is not None and mask.shape[-2] > 1 else mask
        scale = 1 / math.sqrt(q.shape[-1])
        out.append(mx.fast.scaled_dot_product_attention(part, k, v, scale=scale, mask=own))
    return mx.concatenate(out, axis=2)


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
