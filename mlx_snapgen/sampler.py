"""Flow-matching sampling as pure functions.

Noise level sigma runs from 1 (noise) to 0 (picture): x_t = (1 - sigma) x0 + sigma eps, and the
network's velocity is v = eps - x0. Everything that knows the schedule calls this file.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

Velocity = Callable[[mx.array, float], mx.array]
"""(x_t (B, H, W, C), sigma) -> v of the same shape, guidance included."""


class Step(NamedTuple):
    """What the sampler knows after step `index` (from 0)."""

    index: int
    x_t: mx.array
    """Latents at the next noise level; the result after the last step."""
    x0: mx.array
    """The estimate of the clean latents that this step saw."""


def shift_time(t, shift: float):
    """Timestep shift of SD3: shift t / (1 + (shift - 1) t); arrays or numbers in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


def get_schedule(num_steps: int, shift: float = 1.0) -> list[float]:
    """`num_steps + 1` noise levels from 1 down to 0, e.g. 1, .9, .75, .5, 0 for 4 at shift 3."""
    return [shift_time(1 - i / num_steps, shift) for i in range(num_steps + 1)]


def get_noise(seed: int, height: int, width: int, channels: int) -> mx.array:
    """Unit Gaussian latents (1, height, width, channels) of one picture's own seed."""
    return mx.random.normal((1, height, width, channels), key=mx.random.key(seed))


def estimate_x0(x_t: mx.array, v: mx.array, sigma: float) -> mx.array:
    """Clean latents implied by a velocity: x0 = x_t - sigma v."""
    return x_t - sigma * v


def euler_step(x_t: mx.array, v: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """One Euler step along the flow from `sigma` to `next_sigma`."""
    return x_t + (next_sigma - sigma) * v


def guide(v_cond: mx.array, v_uncond: mx.array, guidance_scale: float) -> mx.array:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond); scale 1 is no guidance."""
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def denoise(velocity: Velocity, noise: mx.array, schedule: list[float]) -> Iterator[Step]:
    """Integrate from noise to latents, yielding after every step.

    Stop iterating to cancel; nothing is computed ahead.

    Args:
        velocity: the guided velocity.
        noise: latents (B, H, W, C) at noise level `schedule[0]`.
        schedule: falling noise levels, as from `get_schedule`.
    """
    x_t = noise
    for i, (sigma, next_sigma) in enumerate(itertools.pairwise(schedule)):
        v = velocity(x_t, sigma)
        x0 = estimate_x0(x_t, v, sigma)
        x_t = euler_step(x_t, v, sigma, next_sigma)
        mx.eval(x_t, x0)
        yield Step(i, x_t, x0)
