"""Distillation losses of SnapGen++ as pure functions.

Flow form throughout: x_t = (1 - t) x0 + t eps, v = eps - x0, and so x0 = x_t - t v. Arrays are
(B, ...); t is (B,).
"""

import mlx.core as mx

from mlx_snapgen.sampling import shift_time


def expand(t: mx.array, like: mx.array) -> mx.array:
    """t (B,) with trailing axes of length 1, to multiply an array shaped like `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def logit_normal_density(t: mx.array) -> mx.array:
    """Density of sigmoid(N(0, 1)) at t, divided by its largest value: 1 at .5, 0 at the ends."""
    t = mx.clip(t, 1e-4, 1 - 1e-4)
    logit = mx.log(t / (1 - t))
    # 1 / (t (1 - t)) makes up for the change of variable; the maximum, at t = .5, is 4.
    return mx.exp(-0.5 * logit.square()) / (4 * t * (1 - t))


def timestep_aware(task: mx.array, distillation: mx.array, *, t: mx.array) -> mx.array:
    """S(L_task, L_kd), eq. 8: the task dominates in the middle of the path, the teacher at its
    ends.

    Args:
        task, distillation: losses per sample (B,).

    Returns:
        The mean over samples of a L_task + (1 - a) (|L_task| / |L_kd|) L_kd, a from
        `logit_normal_density`; the ratio carries no gradient.
    """
    a = logit_normal_density(t)
    ratio = mx.stop_gradient(mx.abs(task) / mx.maximum(mx.abs(distillation), 1e-12))
    return (a * task + (1 - a) * ratio * distillation).mean()


def per_sample(error: mx.array) -> mx.array:
    """Mean square of each sample: (B, ...) -> (B,)."""
    return error.square().mean(axis=tuple(range(1, error.ndim)))


def sample_tau(key: mx.array, count: int, *, shift: float = 3.0) -> mx.array:
    """Noise levels for the DMD term: uniform, shifted, kept off the ends of the path."""
    return mx.clip(shift_time(mx.random.uniform(shape=(count,), key=key), shift), 0.02, 0.98)


def dmd_loss(
    x0: mx.array, x_tau: mx.array, *, tau: mx.array, v_critic: mx.array, v_teacher: mx.array
) -> mx.array:
    """A loss whose gradient is the DMD term of eq. 9 (normalized as in DMD2).

    The direction is x0_critic - x0_teacher = tau (v_teacher - v_critic): with velocities the sign
    is opposite to that of eq. 9. It is divided by the mean of |x0 - x0_teacher| of its
    sample.

    Args:
        x0: the student's clean estimate (B, ...), which carries the gradient.
        x_tau: x0 noised to `tau`.
        v_critic, v_teacher: velocities at (x_tau, tau), the teacher's with guidance.
    """
    s = expand(tau, x0)
    x0_critic, x0_teacher = x_tau - s * v_critic, x_tau - s * v_teacher
    axes = tuple(range(1, x0.ndim))
    scale = mx.abs(x0 - x0_teacher).mean(axis=axes, keepdims=True)
    direction = (x0_critic - x0_teacher) / scale
    direction = mx.where(mx.isfinite(direction), direction, 0)
    target = mx.stop_gradient(x0 - direction)
    return 0.5 * (x0 - target).square().mean()


def features_loss(features: mx.array, teacher: mx.array) -> mx.array:
    """L_feat (eq. 7) per sample, in units of the teacher features' own variance.

    Args:
        features: projected student features (B, N, D).
        teacher: the teacher's last-layer features (B, N, D).
    """
    return per_sample(features - teacher) / mx.maximum(mx.var(teacher), 1e-6)
