"""Prompts to latents with a public model; `mlx_snapgen.draw` does the same with one of ours."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_snapgen.sampling import Progress, Start, Step, denoise, get_noise, last_step
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.flow import FlowTeacher, shifted_levels


def denoise_public(
    teacher: FlowTeacher,
    condition: Condition,
    *,
    seeds: Sequence[int],
    settings: DrawSettings,
    references: Sequence[mx.array] = (),
    start: Start | None = None,
) -> Iterator[Step]:
    """Go from the seeds' noise to latents (B, h, w, C), yielding after every step.

    Args:
        condition: a prompt for each picture.
        seeds: one for each picture; the noise of a picture depends on its seed alone.
        settings: size, steps, guidance, time shift and mode, all as numbers (see
            `DrawSettings.resolved`).
        references: see `FlowTeacher.velocity`.
        start: see `sampling.denoise`.
    """
    count, shift = settings.num_inference_steps, settings.time_shift
    scale, few_step = settings.guidance_scale, bool(settings.few_step)
    assert settings.height is not None and settings.width is not None
    assert count is not None and shift is not None and scale is not None
    config = teacher.config
    factor = config.autoencoder.downsampling
    shape = settings.height // factor, settings.width // factor, config.autoencoder.latent_channels

    def velocity(x_t: mx.array, sigma: float) -> mx.array:
        v, _ = teacher.velocity_and_features(
            x_t,
            mx.full((len(x_t),), sigma),
            condition,
            guidance_scale=scale,
            few_step=few_step,
            references=references,
        )
        return v

    noise = mx.concatenate([get_noise(seed, *shape) for seed in seeds])
    levels = shifted_levels(config.sampler_for(count, few_step), count, time_shift=shift)
    yield from denoise(velocity, noise, levels, start=start)


def draw_public(
    teacher: FlowTeacher,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: DrawSettings,
    progress: Progress | None = None,
) -> mx.array:
    """Latents (B, h, w, C) of one picture for each prompt, all in one batch.

    Args:
        settings: as for `denoise_public`, and the negative prompt.
        progress: see `last_step`.
    """
    condition = teacher.encode(prompts, settings.negative_prompt)
    steps = denoise_public(teacher, condition, seeds=seeds, settings=settings)
    return last_step(steps, progress).x_t
