"""The sampler's pure functions."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen import sampling


def test_schedule_of_the_four_step_model():
    np.testing.assert_allclose(sampling.get_schedule(4, 3.0), [1, 0.9, 0.75, 0.5, 0])
    np.testing.assert_allclose(sampling.get_schedule(4), [1, 0.75, 0.5, 0.25, 0])


def test_noise_is_the_seeds_own():
    a, b = (sampling.get_noise(7, 4, 6, 3) for _ in range(2))
    assert a.shape == (1, 4, 6, 3)
    assert bool((a == b).all())
    assert float(mx.abs(a - sampling.get_noise(8, 4, 6, 3)).max()) > 0.1


def test_exact_velocity_of_one_picture_gives_that_picture():
    x0 = mx.random.normal((1, 4, 4, 2), key=mx.random.key(0))
    noise = sampling.get_noise(1, 4, 4, 2)
    # Of all paths to a single picture: v = (x_t - x0) / sigma.
    steps = list(
        sampling.denoise(lambda x, sigma: (x - x0) / sigma, noise, sampling.get_schedule(5, 3.0))
    )
    assert [s.index for s in steps] == [0, 1, 2, 3, 4]
    for step in steps:
        np.testing.assert_allclose(np.array(step.x0), np.array(x0), atol=1e-5)
    np.testing.assert_allclose(np.array(steps[-1].x_t), np.array(x0), atol=1e-5)


def test_euler_error_falls_with_the_steps():
    """Gaussian data of variance s^2 has a closed-form velocity and end point."""
    s = 0.5

    def velocity(x, sigma):
        a = 1 - sigma
        return x * (sigma - a * s * s) / (a * a * s * s + sigma * sigma)

    noise = mx.array([[[[1.0]]]])
    errors = []
    for n in (8, 32, 128):
        *_, last = sampling.denoise(velocity, noise, sampling.get_schedule(n))
        errors.append(abs(float(last.x_t.item()) - s))  # the flow scales noise by s
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_cancel_computes_no_further():
    calls = []

    def velocity(x, sigma):
        calls.append(sigma)
        return x

    for step in sampling.denoise(velocity, mx.ones((1, 2, 2, 1)), sampling.get_schedule(10)):
        if step.index == 2:
            break
    assert len(calls) == 3


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance(scale):
    cond, uncond = mx.array([2.0]), mx.array([1.0])
    assert float(sampling.guide(cond, uncond, scale)) == 1 + scale
