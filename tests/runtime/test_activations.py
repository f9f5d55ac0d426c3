"""The forms of GELU, SiLU and exp on the CPU against MLX's own, values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_snapgen.networks.exponentials import cpu_exp, cpu_gelu, cpu_silu, gelu, silu

PAIRS = [(cpu_gelu, nn.gelu_approx), (gelu, nn.gelu_approx), (cpu_silu, nn.silu), (silu, nn.silu)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_values_and_gradients(ours, theirs):
    x = mx.concatenate([mx.linspace(-12, 12, 4001), mx.array([-1e4, -88.0, 0.0, 88.0, 1e4])])
    np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), atol=1e-5)
    found, expected = (
        np.array(mx.grad(lambda x, f=f: (f(x) * mx.arange(x.size)).sum() / x.size)(x))
        for f in (ours, theirs)
    )
    finite = np.isfinite(expected)
    np.testing.assert_allclose(found[finite], expected[finite], atol=3e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_inside_a_compiled_gradient(ours, theirs):
    x = mx.random.normal((64, 3))
    value, grad = mx.compile(mx.value_and_grad(lambda x: ours(x).square().sum()))(x)
    expected = mx.value_and_grad(lambda x: theirs(x).square().sum())(x)
    np.testing.assert_allclose(float(value), float(expected[0]), rtol=2e-5)
    np.testing.assert_allclose(np.array(grad), np.array(expected[1]), atol=1e-4)


def test_half_precision_is_computed_by_mlx():
    """Squaring seven times would lose it."""
    x = mx.linspace(-4, 4, 101).astype(mx.bfloat16)
    assert mx.array_equal(gelu(x), nn.gelu_approx(x))
    assert mx.array_equal(silu(x), nn.silu(x))


def test_relative_error_of_exp():
    x = np.linspace(-32, 0, 10001)
    np.testing.assert_allclose(np.array(cpu_exp(mx.array(x, mx.float32))), np.exp(x), rtol=2e-5)
