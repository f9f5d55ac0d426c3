"""Core ML's operations, in numpy.

Each function has the name, parameters and defaults of one operation of MIL (coremltools'
converters/mil/mil/ops/defs). Tensors are numpy arrays, floating ones in float32; constants such as
axes are arrays too. The result is an array, or a list if an operation has several outputs;
`convert.mil.execution` rounds it to the type that the program declares.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from convert.mil import products
from convert.mil.products import ints, pairs
from convert.mil.weights import unpack_bits
from mlx_snapgen.errors import UserError

OPS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        products.matmul,
        products.linear,
        products.einsum,
        products.scaled_dot_product_attention,
        products.conv,
        products.conv_transpose,
    )
}
"""Name of each supported operation -> its function."""


def _op(function: Callable) -> Callable:
    OPS[function.__name__] = function
    return function


# --- element by element -----------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float32])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


OPS |= {
    name: lambda x, y, f=f: f(x, y)
    for name, f in {
        **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "real_div": np.divide},
        **{"floor_div": np.floor_divide, "mod": np.mod, "pow": np.power},
        **{"maximum": np.maximum, "minimum": np.minimum},
        **{"equal": np.equal, "not_equal": np.not_equal},
        **{"greater": np.greater, "greater_equal": np.greater_equal},
        **{"less": np.less, "less_equal": np.less_equal},
        **{"logical_and": np.logical_and, "logical_or": np.logical_or},
    }.items()
}
OPS |= {
    name: lambda x, f=f: f(x)
    for name, f in {
        **{"abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.round},
        **{"exp": np.exp, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "erf": _erf},
        **{"sqrt": np.sqrt, "square": np.square, "logical_not": np.logical_not},
        **{"sigmoid": _sigmoid, "relu": lambda x: np.maximum(x, 0)},
        **{"silu": lambda x: x * _sigmoid(x), "identity": np.asarray},
    }.items()
}


@_op
def cast(x, dtype):
    """`execution` casts to the declared type; numpy truncates toward zero, as Core ML does."""
    return x


@_op
def rsqrt(x, epsilon=1e-12):
    return 1 / np.sqrt(x + epsilon)


@_op
def log(x, epsilon=1e-45):
    return np.log(x + epsilon)


@_op
def inverse(x, epsilon=1e-4):
    return 1 / (x + epsilon)


@_op
def clip(x, alpha, beta):
    return np.clip(x, alpha, beta)


@_op
def leaky_relu(x, alpha):
    return np.where(x >= 0, x, alpha * x)


@_op
def gelu(x, mode="EXACT"):
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


@_op
def select(cond, a, b):
    return np.where(cond, a, b)


# --- reductions and normalization -------------------------------------------------------------


def _reduction(f: Callable) -> Callable:
    def reduce(x, axes=None, keep_dims=False):
        axes = None if axes is None else ints(axes)
        return f(x, axis=axes, keepdims=bool(keep_dims))

    return reduce


OPS |= {
    f"reduce_{name}": _reduction(f)
    for name, f in {
        **{"sum": np.sum, "max": np.max, "min": np.min, "prod": np.prod},
        "sum_square": lambda x, **how: np.sum(x * x, **how),
        "l1_norm": lambda x, **how: np.sum(np.abs(x), **how),
        "l2_norm": lambda x, **how: np.sqrt(np.sum(x * x, **how)),
    }.items()
}


@_op
def reduce_argmax(x, axis=-1, keep_dims=False, output_dtype="int32"):
    return np.argmax(x, int(axis), keepdims=bool(keep_dims))


@_op
def softmax(x, axis=-1):
    x = np.exp(x - np.max(x, int(axis), keepdims=True))
    return x / np.sum(x, int(axis), keepdims=True)


Norms = Literal["float32", "fp16 squares", "fp16 sums"]
"""How an engine computes the means of a norm; see `convert.mil.execution.Interpreter`."""


def _mean(x, axes, norms: Norms):
    if norms != "fp16 sums":
        return np.mean(x, axes, keepdims=True)
    total = np.sum(x.astype(np.float16), axes, dtype=np.float16, keepdims=True)
    return total.astype(np.float32) / math.prod(x.shape[a] for a in axes)


@_op
def reduce_mean(x, axes=None, keep_dims=False, norms: Norms = "float32"):
    axes = tuple(range(x.ndim)) if axes is None else ints(axes)
    mean = _mean(x, axes, norms)
    return mean if keep_dims else np.squeeze(mean, axes)


@_op
def layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5, norms: Norms = "float32"):
    axes = range(x.ndim) if axes is None else ints(axes)
    axes = tuple(a % x.ndim for a in axes)
    shape = [n if i in axes else 1 for i, n in enumerate(x.shape)]
    x = x - _mean(x, axes, norms)
    squares = x * x
    if norms != "float32":
        squares = squares.astype(np.float16).astype(np.float32)
    x = x / np.sqrt(_mean(squares, axes, norms) + epsilon)
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@_op
def batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    def by_channel(values):
        return values.reshape(-1, *[1] * (x.ndim - 2))

    x = (x - by_channel(mean)) / np.sqrt(by_channel(variance) + epsilon)
    x = x if gamma is None else x * by_channel(gamma)
    return x if beta is None else x + by_channel(beta)


@_op
def instance_norm(x, gamma=None, beta=None, epsilon=1e-5):
    axes = tuple(range(2, x.ndim))
    mean, variance = np.mean(x, axes, keepdims=True), np.var(x, axes, keepdims=True)
    x = (x - mean) / np.sqrt(variance + epsilon)
    shape = (-1, *[1] * len(axes))
    x = x if gamma is None else x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


# --- moving things about ----------------------------------------------------------------------


@_op
def transpose(x, perm):
    return np.transpose(x, ints(perm))


@_op
def reshape(x, shape):
    shape = ints(shape)
    if 0 in shape and len(shape) == x.ndim:
        shape = tuple(old if n == 0 else n for n, old in zip(shape, x.shape, strict=True))
    return x.reshape(shape)


@_op
def expand_dims(x, axes):
    return np.expand_dims(x, ints(axes))


@_op
def squeeze(x, axes=None):
    return np.squeeze(x, None if axes is None else ints(axes))


@_op
def concat(values, axis, interleave=False):
    if not interleave:
        return np.concatenate(values, int(axis))
    axis = int(axis) % values[0].ndim
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis + 1).reshape(shape)


@_op
def stack(values, axis):
    return np.stack(values, int(axis))


@_op
def split(x, axis, num_splits=None, split_sizes=None):
    if split_sizes is None:
        return np.split(x, ints(num_splits)[0], int(axis))
    return np.split(x, np.cumsum(ints(split_sizes))[:-1], int(axis))


@_op
def slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    def flags(mask):
        return [False] * x.ndim if mask is None else [bool(m) for m in np.atleast_1d(mask)]

    stride = (1,) * x.ndim if stride is None else ints(stride)
    index: list[int | slice] = []
    for i, (first, last, step) in enumerate(zip(ints(begin), ints(end), stride, strict=True)):
        if flags(squeeze_mask)[i]:
            index.append(first)
            continue
        first = None if flags(begin_mask)[i] else first
        last = None if flags(end_mask)[i] else last
        index.append(slice(first, last, step))
    return x[tuple(index)]


@_op
def slice_by_size(x, begin, size):
    begin = [b % n if b < 0 else b for b, n in zip(ints(begin), x.shape, strict=True)]
    ends = [n if s == -1 else b + s for b, s, n in zip(begin, ints(size), x.shape, strict=True)]
    return x[tuple(slice(b, e) for b, e in zip(begin, ends, strict=True))]


@_op
def tile(x, reps):
    return np.tile(x, ints(reps))


@_op
def pad(x, pad, mode="constant", constant_val=0.0):
    widths = pairs(pad)
    widths = [(0, 0)] * (x.ndim - len(widths)) + widths
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    if mode == "reflect":
        return np.pad(x, widths, "reflect")
    if mode == "replicate":
        return np.pad(x, widths, "edge")
    raise KeyError(mode)


@_op
def gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    axis, batch_dims = int(axis) % x.ndim, int(batch_dims)
    if batch_dims:
        rows = zip(x, indices, strict=True)
        return np.stack([gather(r, i, axis - 1, batch_dims - 1) for r, i in rows])
    wrong = (indices >= x.shape[axis]) | (indices < -x.shape[axis])
    if np.any(wrong):
        raise UserError(f"index {np.asarray(indices)[wrong][0]} of an axis of {x.shape[axis]}")
    return np.take(x, indices, axis)


@_op
def gather_along_axis(x, indices, axis=0, validate_indices=False):
    return np.take_along_axis(x, indices, int(axis))


@_op
def upsample_nearest_neighbor(x, scale_factor_height=1, scale_factor_width=1):
    for axis, factor in ((-2, float(scale_factor_height)), (-1, float(scale_factor_width))):
        size = int(x.shape[axis] * factor)
        x = np.take(x, np.minimum(np.arange(size) / factor, x.shape[axis] - 1).astype(int), axis)
    return x


@_op
def pixel_shuffle(x, upscale_factor):
    n, c, h, w = x.shape
    f = int(upscale_factor)
    x = x.reshape(n, c // (f * f), f, f, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (f * f), h * f, w * f)


@_op
def pixel_unshuffle(x, downscale_factor):
    n, c, h, w = x.shape
    f = int(downscale_factor)
    x = x.reshape(n, c, h // f, f, w // f, f).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * f * f, h // f, w // f)


# --- compressed weights -----------------------------------------------------------------------


def _spread(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Repeat every element over its block, so that the leading dimensions become `shape`."""
    for axis, n in enumerate(shape):
        if x.shape[axis] != n:
            x = np.repeat(x, n // x.shape[axis], axis)
    return x


@_op
def constexpr_lut_to_dense(indices, lut, shape=None, vector_axis=None):
    """With `shape`, iOS 16's: one palette, indices packed in bytes. Without, iOS 18's.

    There `lut` is (*G, palette, vector): one palette for each of the G blocks that the indices
    divide into, whose entries are vectors along `vector_axis`.
    """
    if shape is not None:
        bits, count = int(lut.size - 1).bit_length(), math.prod(ints(shape))
        return lut[unpack_bits(indices, bits, count)].reshape(ints(shape))
    *groups, size, vector = lut.shape
    first = np.arange(math.prod(groups)).reshape(groups) * size
    dense = lut.reshape(-1, vector)[_spread(first, indices.shape) + indices]
    if vector == 1:
        return dense[..., 0]
    axis = ints(vector_axis)[0] % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= vector
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


@_op
def constexpr_blockwise_shift_scale(data, scale, offset=None):
    data = data.astype(np.float32)
    if offset is not None:
        data = data - _spread(offset, data.shape).astype(np.float32)
    return data * _spread(scale, data.shape)


@_op
def constexpr_affine_dequantize(quantized_data, zero_point, scale, axis):
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    zero_point, scale = (
        v.astype(np.float32).reshape(shape if v.ndim else ()) for v in (zero_point, scale)
    )
    return (quantized_data.astype(np.float32) - zero_point) * scale


@_op
def constexpr_cast(source_val, output_dtype):
    return source_val
