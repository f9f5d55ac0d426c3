"""The CPU form of GELU against MLX's own, values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.layers import cpu_gelu, gelu


def test_value_and_gradient_equal_tanh_gelu():
    x = mx.concatenate([mx.linspace(-12, 12, 4001), mx.array([-1e4, -88.0, 0.0, 88.0, 1e4])])
    np.testing.assert_allclose(np.array(cpu_gelu(x)), np.array(nn.gelu_approx(x)), atol=1e-5)
    np.testing.assert_allclose(np.array(gelu(x)), np.array(nn.gelu_approx(x)), atol=1e-5)
    ours, theirs = (
        mx.grad(lambda x, f=f: (f(x) * mx.arange(x.size)).sum() / x.size)(x)
        for f in (cpu_gelu, nn.gelu_approx)
    )
    finite = np.isfinite(np.array(theirs))
    np.testing.assert_allclose(np.array(ours)[finite], np.array(theirs)[finite], atol=3e-5)
    assert bool(mx.isfinite(ours).all())


def test_inside_a_compiled_gradient():
    x = mx.random.normal((64, 3))
    step = mx.compile(mx.value_and_grad(lambda x: cpu_gelu(x).square().sum()))
    value, grad = step(x)
    expected = mx.value_and_grad(lambda x: nn.gelu_approx(x).square().sum())(x)
    np.testing.assert_allclose(float(value), float(expected[0]), rtol=1e-5)
    np.testing.assert_allclose(np.array(grad), np.array(expected[1]), atol=1e-4)
