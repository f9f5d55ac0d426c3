"""Distillation losses against closed forms."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.sampling import add_noise
from train.objectives.distillation import features_loss, logit_normal_density, timestep_aware
from train.objectives.kdmd import dmd_loss, sample_tau
from train.objectives.losses import channel_weights, expand, per_sample


def test_losses_are_per_sample_over_all_other_axes():
    error = mx.random.normal((3, 2, 5, 4), key=mx.random.key(0))
    expected = [np.square(row).mean() for row in np.array(error)]
    np.testing.assert_allclose(np.array(per_sample(error)), expected, rtol=1e-5)
    assert expand(mx.arange(3), error).shape == (3, 1, 1, 1)


def gaussian_velocity(x, t, mean, std):
    """The exact velocity of data N(mean, std^2): E[eps - x0 | x_t = x]."""
    a = 1 - t
    slope = (t - a * std**2) / (a**2 * std**2 + t**2)
    return slope * (x - a * mean) - mean


@pytest.mark.parametrize(("student", "teacher"), [(1.5, -0.5), (-1.0, 2.0), (0.3, 0.1)])
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_dmd_gradient_is_the_kl_gradient_of_gaussians(student, teacher, tau):
    """Both are N(., s^2), so at noise level tau the KL is (difference of means)^2 over twice the
    variance, and DMD's direction is that gradient times tau^2 / (1 - tau), before normalization."""
    std, n = 0.7, 4096
    mx.random.seed(0)
    x0 = student + std * mx.random.normal((1, n))
    x_tau = add_noise(x0, mx.random.normal((1, n)), tau)
    level = mx.array([tau])
    v_critic = gaussian_velocity(x_tau, tau, student, std)
    v_teacher = gaussian_velocity(x_tau, tau, teacher, std)
    # The derivative with respect to the student's mean, by the chain rule a sum over samples.
    velocities = {"tau": level, "v_critic": v_critic, "v_teacher": v_teacher}
    gradient = mx.grad(lambda m: dmd_loss(x0 - student + m, x_tau, **velocities))(
        mx.array(student)
    ).item()
    variance = (1 - tau) ** 2 * std**2 + tau**2
    kl_gradient = (1 - tau) ** 2 * (student - teacher) / variance
    normalizer = mx.abs(x0 - (x_tau - tau * v_teacher)).mean().item()
    assert gradient == pytest.approx(kl_gradient * tau**2 / (1 - tau) ** 2 / normalizer, rel=1e-3)
    assert np.sign(gradient) == np.sign(student - teacher), "descent leads to the teacher"


def test_descent_on_dmd_alone_reaches_the_teacher():
    mean, target, std = 2.0, -1.0, 0.5
    for step in range(300):
        key_x, key_eps, key_tau = mx.random.split(mx.random.key(step), 3)
        z, eps = (mx.random.normal((64, 4), key=k) for k in (key_x, key_eps))
        tau = sample_tau(key_tau, 64)
        x0 = mean + std * z
        t = tau[:, None]
        x_tau = add_noise(x0, eps, t)
        velocities = [gaussian_velocity(x_tau, t, m, std) for m in (mean, target)]

        def loss(m, z=z, x_tau=x_tau, tau=tau, velocities=velocities):
            return dmd_loss(
                m + std * z, x_tau, tau=tau, v_critic=velocities[0], v_teacher=velocities[1]
            )

        mean -= 0.1 * mx.grad(loss)(mx.array(mean)).item()
    assert mean == pytest.approx(target, abs=0.1)


def test_dmd_survives_a_student_that_is_the_teacher():
    x = mx.ones((2, 3))
    still = {"tau": mx.array([0.5, 0.5]), "v_critic": x * 0, "v_teacher": x * 0}
    gradient = mx.grad(lambda x0: dmd_loss(x0, x, **still))(x)
    np.testing.assert_array_equal(np.array(gradient), 0)


def test_timestep_weights():
    t = mx.array([0.5, 0.02, 0.98, 0.3])
    a = np.array(logit_normal_density(t))
    assert a[0] == pytest.approx(1)
    assert a[1] == pytest.approx(a[2], rel=1e-3) and a[1] < 0.01
    density = np.exp(-0.5 * np.log(0.3 / 0.7) ** 2) / (0.3 * 0.7) / 4
    assert a[3] == pytest.approx(density, rel=1e-4)


def test_timestep_aware_trusts_data_in_the_middle_and_the_teacher_at_the_ends():
    def gradients(t):
        def loss(task, distillation):
            return timestep_aware(task, distillation, t=mx.array([t]))

        return [g.item() for g in mx.grad(loss, argnums=(0, 1))(mx.array([2.0]), mx.array([0.5]))]

    task, distillation = gradients(0.5)
    assert task == pytest.approx(1) and distillation == pytest.approx(0, abs=1e-6)
    task, distillation = gradients(0.001)
    assert task < 0.01 and distillation == pytest.approx(4, rel=0.01), "scaled to the task's size"
    value = timestep_aware(mx.array([2.0, 3.0]), mx.array([0.5, 9.0]), t=mx.array([0.1, 0.7]))
    assert value.item() == pytest.approx(2.5), "the scaled loss has the task's magnitude"


def test_features_loss_is_relative():
    mx.random.seed(0)
    teacher = mx.random.normal((2, 5, 8))
    student = teacher + 0.5
    expected = 0.25 / np.var(np.array(teacher))
    np.testing.assert_allclose(np.array(features_loss(student, teacher)), expected, rtol=1e-4)
    np.testing.assert_allclose(
        np.array(features_loss(100 * student, 100 * teacher)), expected, rtol=1e-4
    )


def test_tau_is_shifted_and_kept_inside():
    tau = np.array(sample_tau(mx.random.key(0), 4000))
    assert tau.min() >= 0.02 and tau.max() <= 0.98
    assert np.median(tau) == pytest.approx(0.75, abs=0.02)


class Decoder:
    """Latents of 3 channels, which change the picture 1, 2 and 0 times as much as they change."""

    config = SimpleNamespace(semantics=None)

    def decode(self, latents):
        return latents * mx.array([1.0, 2.0, 0.0])


def test_channels_weigh_what_they_change_in_the_picture():
    latents = mx.random.normal((2, 40, 40, 3))
    weights = channel_weights(Decoder(), latents, power=1)
    assert weights.tolist() == pytest.approx([3 / 5, 12 / 5, 0], rel=0.1)
    half = channel_weights(Decoder(), latents, power=0.5)
    assert half.tolist() == pytest.approx([1, 2, 0], rel=0.05)
    assert channel_weights(Decoder(), latents, power=0) is None
    error = mx.random.normal((2, 4, 4, 3))
    expected = (np.array(error) ** 2 * np.array(half)).mean(axis=(1, 2, 3))
    assert per_sample(error, half).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("scale", [0, float("inf"), float("nan")])
def test_a_decoder_without_pictures_gives_no_weights(scale):
    decoder = SimpleNamespace(decode=lambda latents: scale * latents, config=Decoder.config)
    with pytest.raises(UserError, match="--channel-weights: the autoencoder decodes all latents"):
        channel_weights(decoder, mx.random.normal((1, 4, 4, 3)), power=0.5)
