"""GELU, SiLU and the weights of attention, fast on every backend.

MLX computes exp and tanh on the CPU one element at a time, so that a softmax or GELU costs more
than the matrix products around it. There, exp(x) is a polynomial of a fraction of x, squared
several times: plain arithmetic, which the compiler turns into vector instructions. It is five
times faster, with a relative error below 2e-5. Metal and CUDA use MLX's functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_C = 0.7978845608028654  # sqrt(2 / pi)
# Coefficients in ascending order, of the least relative error: 2.5e-8 and 1.1e-8.
_TO_0 = (1.0, 0.999997857, 0.499968531, 0.166488382, 0.0411733757, 0.00761110495, 8.34911545e-4)
"""Of exp(x) on [-1, 0]."""
_AROUND_0 = (1.0, 0.999999956, 0.499996979, 0.166669131, 0.0417964628, 0.00831474934)
"""Of exp(x) on [-1/4, 1/4]."""


def float32_on_cpu(x: mx.array) -> bool:
    """Whether x is best computed as here: in float32 on the CPU."""
    return x.dtype == mx.float32 and mx.default_device().type == mx.DeviceType.cpu


def gelu(x: mx.array) -> mx.array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), element-wise."""
    return cpu_gelu(x) if float32_on_cpu(x) else nn.gelu_approx(x)


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x), element-wise."""
    return cpu_silu(x) if float32_on_cpu(x) else nn.silu(x)


def _exp(x: mx.array, coefficients: Sequence[float], *, squarings: int) -> mx.array:
    """The polynomial of x / 2^squarings, to the power of 2^squarings."""
    scaled = [c / 2 ** (squarings * i) for i, c in enumerate(coefficients)]
    p: Any = scaled[-1]
    for coefficient in scaled[-2::-1]:
        p = coefficient + x * p
    for _ in range(squarings):
        p = p * p
    return p


def cpu_exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0; below -32 it is 1.3e-14, exp(-32)."""
    return _exp(mx.maximum(x, -32.0), _TO_0, squarings=5)


def cpu_sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x)), element-wise; x beyond +-32 counts as that."""
    return 1 / (1 + _exp(mx.clip(-x, -32.0, 32.0), _AROUND_0, squarings=7))


def _with_gradient(
    value: Callable[[mx.array], mx.array], gradient: Callable[..., mx.array]
) -> Callable[[mx.array], Any]:
    """A compiled `value` of x whose gradient is `gradient`(x, cotangent, output)."""
    function = mx.custom_function(mx.compile(value))
    function.vjp(mx.compile(gradient))
    return function


def _gelu_slope(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    x = mx.clip(x, -12.0, 12.0)  # beyond, the slope is 0 or 1 in float32
    s = cpu_sigmoid(2 * _C * (x + 0.044715 * x * x * x))
    return cotangent * (s + x * s * (1 - s) * (2 * _C * (1 + 0.134145 * x * x)))


def _silu_slope(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    s = cpu_sigmoid(x)
    return cotangent * (s + x * s * (1 - s))


cpu_gelu = _with_gradient(
    lambda x: x * cpu_sigmoid(2 * _C * (x + 0.044715 * x * x * x)), _gelu_slope
)
"""`gelu` as it runs on the CPU."""

cpu_silu = _with_gradient(lambda x: x * cpu_sigmoid(x), _silu_slope)
"""`silu` as it runs on the CPU."""


@mx.compile
def _exp_below(scores: mx.array, top: mx.array) -> mx.array:
    return cpu_exp(scores - top)


@mx.compile
def _slope_of_exp(weights: mx.array, cotangent: mx.array, of_total: mx.array) -> mx.array:
    return weights * (cotangent + of_total)


def exponential_weights(scores: mx.array) -> tuple[mx.array, mx.array]:
    """scores (..., keys) -> exp(scores - their maximum), and its sum over the keys (..., 1)."""
    weights: Any = _exponential_weights(scores)
    return weights


@mx.custom_function
def _exponential_weights(scores: mx.array) -> tuple[mx.array, mx.array]:
    weights = _exp_below(scores, mx.max(scores, axis=-1, keepdims=True))
    return weights, mx.sum(weights, axis=-1, keepdims=True)


@_exponential_weights.vjp
def _exponential_weights_vjp(_, cotangents, outputs):
    # The maximum is a constant: it changes weights and sum by the same factor.
    return _slope_of_exp(outputs[0], *cotangents)
