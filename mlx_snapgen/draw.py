"""Prompts to latents and pictures."""

import functools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import FEW_STEP, Components
from mlx_snapgen.lora.adapters import switched
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.pictures import to_pictures
from mlx_snapgen.sampling import denoise, get_noise, get_schedule, guided_velocity


def draw_latents(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    width: float = 1.0,
    network: Callable[..., mx.array] | None = None,
    most_steps: int | None = None,
) -> mx.array:
    """Latents (B, h, w, C) of prompts, drawn as the model samples when nobody says how.

    Args:
        network: computes the velocity instead of the model's transformer.
        most_steps: of sampling.
    """
    config = components.config
    sampler = config.sampler_for()
    scale, steps = sampler.guidance_scale, sampler.num_inference_steps
    side = config.autoencoder.downsampling
    shape = (*(n // side for n in config.image_size), config.transformer.latent_channels)
    both = list(prompts) if scale == 1 else [""] * len(prompts) + list(prompts)
    text, mask = encode_prompts(both, components.text_encoders, components.transformer)
    velocity = guided_velocity(network or components.transformer, text, mask, scale, width=width)

    def draw(number: int) -> mx.array:
        return mx.concatenate([get_noise(seed, *shape, number) for seed in seeds])

    schedule = get_schedule(min(steps, most_steps or steps), sampler.time_shift)
    *_, last = denoise(velocity, draw(0), schedule, draw if sampler.fresh_noise else None)
    return last.x_t


def sample(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    width: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    time_shift: float | None = None,
    few_step: bool | None = None,
    attention_modulation: bool = False,
    adapter: str = FEW_STEP,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Draw one picture for each prompt, at the model's own size.

    Args:
        components: the model.
        prompts, seeds: one of each per picture; a picture's noise is its seed's alone.
        width: share of the hidden dimensions, one that the transformer holds.
        steps, guidance, time_shift: None takes the model's own; guidance 1 is none at all.
        few_step: whether to use the model's few-step mode (see `ModelConfig.sampler_for`).
        attention_modulation: EDT's (see `EfficientDiT`).
        adapter: name of the few-step mode's adapter.
        batch_size: pictures at a time.
        progress: called with the number of pictures that were just finished.

    Returns:
        uint8 (B, H, W, 3), RGB.

    Raises:
        UserError: the model does not hold `width`, or its pictures are not finite.
    """
    config = components.config
    config.transformer.width_index(width)
    mode = config.sampler_for(steps, few_step)
    network = components.transformer
    if config.few_step is not None:
        network = switched(network, {adapter: float(mode is config.few_step)})
    steps = mode.num_inference_steps if steps is None else steps
    guidance = mode.guidance_scale if guidance is None else guidance
    schedule = get_schedule(steps, mode.time_shift if time_shift is None else time_shift)
    h, w = (side // config.autoencoder.downsampling for side in config.image_size)
    shape = (h, w, config.autoencoder.latent_channels)
    settings = {"width": width, "modulate_attention": attention_modulation}
    pictures = []
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        negative = [] if guidance == 1 else [""] * len(some)
        encoded = encode_prompts(negative + some, components.text_encoders, components.transformer)
        mx.eval(encoded)
        velocity = guided_velocity(network, *encoded, guidance, **settings)
        draw = functools.partial(_noise, seeds[start : start + len(some)], shape)
        *_, last = denoise(velocity, draw(0), schedule, draw if mode.fresh_noise else None)
        pictures.append(to_pictures(components.autoencoder.decode(last.x_t)))
        if progress is not None:
            progress(len(some))
    return np.concatenate(pictures)


def _noise(seeds: Sequence[int], shape: tuple[int, int, int], number: int) -> mx.array:
    """Draw `number` of each seed, (B, h, w, C)."""
    return mx.concatenate([get_noise(seed, *shape, number) for seed in seeds])
