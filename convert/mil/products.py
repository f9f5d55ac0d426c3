"""Products of tensors as in Core ML, in numpy: matrices, attention, convolutions.

The conventions are those of `convert.mil.ops`, which lists these operations too.
"""

import itertools
import math

import numpy as np

from mlx_snapgen.errors import UserError


def ints(values) -> tuple[int, ...]:
    """The integers of a constant, one or several."""
    return tuple(int(n) for n in np.atleast_1d(values))


def pairs(values) -> list[tuple[int, int]]:
    """(before, after) of each dimension, from one flat list."""
    values = ints(values)
    return list(zip(values[::2], values[1::2], strict=True))


def matmul(x, y, transpose_x=False, transpose_y=False):
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return x @ y


def linear(x, weight, bias=None):
    x = x @ weight.T
    return x if bias is None else x + bias


def einsum(values, equation):
    x, y = values
    left, right, out = equation.replace(" ", "").replace("->", ",").split(",")
    # The only form in Core ML, apart from the letters: (B, C, H, W) x (B, W, H, V).
    if (right[-3], right[-2], out[:-1], out[-1]) != (left[-1], left[-2], left[:-1], right[-1]):
        return np.einsum(equation, x, y, optimize=True)
    return np.swapaxes(np.swapaxes(x, -3, -2) @ np.swapaxes(y, -3, -2), -3, -2)


def scaled_dot_product_attention(query, key, value, attn_mask=None):
    scores = query @ np.swapaxes(key, -1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        mask = attn_mask
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True) @ value


def _spatial(rank: int, kernel, strides, dilations, pad_type, pad) -> tuple:
    """Strides, dilations and (before, after) paddings for each spatial dimension."""
    strides = (1,) * rank if strides is None else ints(strides)
    dilations = (1,) * rank if dilations is None else ints(dilations)
    if pad_type == "custom":
        return strides, dilations, [(0, 0)] * rank if pad is None else pairs(pad)
    if pad_type == "valid":
        return strides, dilations, [(0, 0)] * rank
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if any(s != 1 for s in strides) or any(r % 2 for r in reach):
        # Operations differ in the side to which they add an odd element.
        raise UserError(f"pad_type '{pad_type}' with strides {strides} and kernel {kernel}")
    return strides, dilations, [(r // 2, r // 2) for r in reach]


def _grouped(x: np.ndarray, groups: int) -> np.ndarray:
    """(N, C, *D) -> (N, groups, C / groups, product of D)."""
    return x.reshape(len(x), groups, x.shape[1] // groups, -1)


def conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    """x (N, C, *D), weight (O, C / groups, *K): one product for each position in the kernel."""
    kernel, rank, groups = weight.shape[2:], x.ndim - 2, int(groups)
    strides, dilations, pads = _spatial(rank, kernel, strides, dilations, pad_type, pad)
    x = np.pad(x, [(0, 0), (0, 0), *pads])
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], *kernel)
    out = np.float32(0)
    for place in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(place, dilations, strides, size, strict=True)
        )
        out = out + weight[(..., *place)] @ _grouped(x[(..., *window)], groups)
    out = out.reshape(len(x), -1, *size)
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)


def conv_transpose(
    x,
    weight,
    bias=None,
    strides=None,
    pad_type="valid",
    pad=None,
    dilations=None,
    groups=1,
    output_shape=None,
):
    """x (N, C, *D), weight (C, O / groups, *K)."""
    kernel, rank, groups = weight.shape[2:], x.ndim - 2, int(groups)
    strides, dilations, pads = _spatial(rank, kernel, strides, dilations, pad_type, pad)
    full = [
        (n - 1) * s + d * (k - 1) + 1
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    size = [n - before - after for n, (before, after) in zip(full, pads, strict=True)]
    if output_shape is not None:
        size = ints(output_shape)[2:]
    ends = [max(n, p[0] + m) for n, p, m in zip(full, pads, size, strict=True)]
    out = np.zeros((len(x), groups * weight.shape[1], *ends), np.float32)
    taps = weight.reshape(groups, len(weight) // groups, weight.shape[1], *kernel)
    for place in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(place, dilations, strides, x.shape[2:], strict=True)
        )
        tap = np.swapaxes(taps[(..., *place)], -1, -2) @ _grouped(x, groups)
        out[(..., *window)] += tap.reshape(*out.shape[:2], *x.shape[2:])
    crop = tuple(slice(p[0], p[0] + n) for p, n in zip(pads, size, strict=True))
    out = out[(..., *crop)]
    return out if bias is None else out + bias.reshape(-1, *[1] * rank)
