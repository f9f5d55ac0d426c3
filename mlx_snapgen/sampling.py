"""Flow-matching sampling as pure functions.

Noise level sigma runs from 1 (noise) to 0 (picture): x_t = (1 - sigma) x0 + sigma eps, and the
network's velocity is v = eps - x0. All code that needs the noise schedule calls `get_schedule` or
`shift_time`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

Velocity = Callable[[mx.array, float], mx.array]
"""(x_t (B, H, W, C), sigma) -> v of the same shape, guidance included."""


@dataclass(frozen=True)
class Step:
    """The sampler's state after step `index` (from 0)."""

    index: int
    x_t: mx.array
    """Latents at the next noise level; the result after the last step."""
    x0: mx.array
    """The estimate of the clean latents at the start of the step."""
    sigma: float
    """Noise level at the start of the step."""
    num_steps: int

    @property
    def final(self) -> bool:
        """Whether `x_t` is the result."""
        return self.index == self.num_steps - 1


@dataclass(frozen=True)
class Start:
    """A picture that sampling starts from, instead of noise alone."""

    x0: mx.array
    """Its latents (1, H, W, C)."""
    strength: float
    """See `cut_schedule`."""
    redrawn: mx.array | None = None
    """(1, H, W, 1): 1 where the picture is redrawn, 0 where it stays; None redraws all of it."""


def shift_time(t, shift: float):
    """Timestep shift of SD3: shift t / (1 + (shift - 1) t); arrays or numbers in [0, 1]."""
    return shift * t / (1 + (shift - 1) * t)


def get_schedule(num_steps: int, shift: float = 1.0) -> list[float]:
    """`num_steps + 1` noise levels from 1 down to 0, e.g. 1, .9, .75, .5, 0 for 4 at shift 3."""
    return [shift_time(1 - i / num_steps, shift) for i in range(num_steps + 1)]


def cut_schedule(schedule: Sequence[float], strength: float) -> list[float]:
    """The last part of a schedule, for a picture that is redrawn with a strength in (0, 1].

    Of N steps, about strength * N remain, as in `get_timesteps` of diffusers' pipelines.
    """
    count = len(schedule) - 1
    return [*schedule[int(count - min(count * strength, count)) :]]


def get_noise(seed: int, height: int, width: int, channels: int, draw: int = 0) -> mx.array:
    """Unit Gaussian latents (1, height, width, channels) of the seed of one picture.

    Draw 0 is the initial noise; later draws are fresh noise for the steps (see `denoise`).
    """
    key = mx.random.key(seed)
    for _ in range(draw):
        key = mx.random.split(key)[1]
    return mx.random.normal((1, height, width, channels), key=key)


def add_noise(x0: mx.array, eps: mx.array, sigma) -> mx.array:
    """The point x_t on the straight path from x0 to eps; `sigma` broadcasts."""
    return (1 - sigma) * x0 + sigma * eps


def estimate_x0(x_t: mx.array, v: mx.array, sigma: float) -> mx.array:
    """Clean latents implied by a velocity: x0 = x_t - sigma v."""
    return x_t - sigma * v


def euler_step(x_t: mx.array, v: mx.array, sigma: float, next_sigma: float) -> mx.array:
    """One Euler step along the flow from `sigma` to `next_sigma`."""
    return x_t + (next_sigma - sigma) * v


def blend(redrawn: mx.array, kept: mx.array, mask: mx.array) -> mx.array:
    """`redrawn` where the mask is 1 and `kept` where it is 0; the mask broadcasts."""
    return (1 - mask) * kept + mask * redrawn


def guide(v_cond: mx.array, v_uncond: mx.array, guidance_scale: float) -> mx.array:
    """Classifier-free guidance: v_uncond + scale (v_cond - v_uncond); scale 1 is no guidance."""
    return v_uncond + guidance_scale * (v_cond - v_uncond)


def guided_velocity(
    network: Callable[..., mx.array],
    text: mx.array,
    mask: mx.array,
    guidance_scale: float = 1.0,
    **settings,
) -> Velocity:
    """The velocity that a sampler integrates: float32, with guidance.

    Args:
        network: `EfficientDiT`, or a function that is called with (x_t, t (B,), text, mask,
            **settings).
        text, mask: (B, L, D) and (B, L); with guidance (2 B, ...), the negative prompts before the
            prompts.
        guidance_scale: 1 disables guidance.
        settings: further arguments of the network, such as its width.
    """
    guided = guidance_scale != 1

    def velocity(x_t: mx.array, sigma: float) -> mx.array:
        x_t = x_t.astype(text.dtype)
        batch = mx.concatenate([x_t, x_t]) if guided else x_t
        v = network(batch, mx.full((len(batch),), sigma), text, mask, **settings)
        v = v.astype(mx.float32)
        if not guided:
            return v
        v_uncond, v_cond = mx.split(v, 2)
        return guide(v_cond, v_uncond, guidance_scale)

    return velocity


def denoise(
    velocity: Velocity,
    noise: mx.array,
    schedule: Sequence[float],
    fresh_noise: Callable[[int], mx.array] | None = None,
    *,
    start: Start | None = None,
) -> Iterator[Step]:
    """Go from noise to latents, yielding after every step.

    Stop iterating to cancel; nothing is computed ahead.

    Args:
        velocity: the guided velocity.
        noise: latents (B, H, W, C): unit noise, or another state at noise level `schedule[0]`.
        schedule: falling noise levels, as from `get_schedule`.
        fresh_noise: None takes Euler steps along the flow. Otherwise each step adds new noise to
            its estimate instead: the function is called with 1, 2, ... and returns unit noise like
            `noise`. Models distilled to few steps by distribution matching are trained so (DMD2
            section 4.4).
        start: begins with its latents and unit noise at the start of its part of the schedule.
            Where it stays, these latents replace the result of every step, with noise at its level.
    """
    x_t, eps = noise, noise
    if start is not None:
        schedule = cut_schedule(schedule, start.strength)
        x_t = add_noise(start.x0, eps, schedule[0])
    for i, (sigma, next_sigma) in enumerate(itertools.pairwise(schedule)):
        v = velocity(x_t, sigma)
        x0 = estimate_x0(x_t, v, sigma)
        if fresh_noise is None:
            x_t = euler_step(x_t, v, sigma, next_sigma)
        else:
            eps = fresh_noise(i + 1) if next_sigma else eps
            x_t = add_noise(x0, eps, next_sigma) if next_sigma else x0
        if start is not None and start.redrawn is not None:
            x_t = blend(x_t, add_noise(start.x0, eps, next_sigma), start.redrawn)
            x0 = blend(x0, start.x0, start.redrawn)
        mx.eval(x_t, x0)
        yield Step(i, x_t, x0=x0, sigma=sigma, num_steps=len(schedule) - 1)


Progress = Callable[[float], object]
"""Called with the number of pictures that were just finished, which may be parts of one."""
DENOISING = 0.9
"""Part of a picture's work that `Progress` counts for all its steps; decoding is the rest."""


def last_step(steps: Iterator[Step], progress: Progress | None = None) -> Step:
    """The last of some steps."""
    last = None
    for last in steps:
        if progress is not None:
            progress(DENOISING * len(last.x_t) / last.num_steps)
    assert last is not None
    return last
