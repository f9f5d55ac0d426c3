"""Prompts to latents and pictures: the sampling loop of single pictures and of batches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import FEW_STEP, Components
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.lora.adapters import get_lora_weights, with_lora_weights
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.networks.parallel import each_on_a_core, on_all_cores, streams
from mlx_snapgen.networks.products import apart
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.pictures import to_uint8
from mlx_snapgen.sampling import (
    DENOISING,
    Progress,
    Start,
    Step,
    denoise,
    get_noise,
    get_schedule,
    guided_velocity,
    last_step,
)
from mlx_snapgen.settings import DrawSettings

MOST_AT_ONCE = 1 << 17
"""Pixels of a picture up to which some are decoded at once: others would need too much memory."""
Encode = Callable[[Sequence[Prompt]], tuple[mx.array, mx.array]]
"""Prompts -> text (B, L, D) and mask (B, L); None is absent text."""


def encode_for(
    settings: DrawSettings, prompts: Sequence[str], *, config: ModelConfig, encode: Encode
) -> tuple[mx.array, mx.array]:
    """Text and mask for `denoise_latents`: with guidance, the negative prompts first.

    Args:
        settings: resolved.
        prompts: one for each picture of the batch.
        config: the model's.
    """
    negative: Prompt = settings.negative_prompt
    if config.unconditional == "absent" and not settings.negative_prompt.strip():
        negative = None
    away = [] if settings.guidance_scale == 1 else [negative] * len(prompts)
    text, mask = encode([*away, *prompts])
    mx.eval(text, mask)
    return text, mask


def batch_texts(texts: Sequence[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """The results of `encode_for` for one prompt each, as its result for all of them."""
    if len(texts) == 1:
        return texts[0]
    text, mask = (mx.stack(list(parts), axis=1) for parts in zip(*texts, strict=True))
    return text.reshape(-1, *text.shape[2:]), mask.reshape(-1, *mask.shape[2:])


def denoise_latents(
    network: Callable[..., mx.array],
    text: mx.array,
    mask: mx.array,
    *,
    seeds: Sequence[int],
    settings: DrawSettings,
    config: ModelConfig,
    share: float = 1.0,
    start: Start | None = None,
) -> Iterator[Step]:
    """Go from the seeds' noise to latents (B, h, w, C), yielding after every step.

    On the CPU each picture is the same, bit for bit, in batches of all sizes.

    Args:
        network: `EfficientDiT`, or a function with the same arguments.
        text, mask: from `encode_for`.
        seeds: one for each picture; the noise of a picture depends on its seed alone.
        settings: resolved.
        config: the model's.
        share: of the network's hidden dimensions.
        start: see `sampling.denoise`.
    """
    assert settings.height is not None and settings.width is not None
    assert settings.time_shift is not None
    sampler, factor = settings.sampler(config), config.autoencoder.downsampling
    shape = settings.height // factor, settings.width // factor, config.transformer.latent_channels
    velocity = guided_velocity(
        on_all_cores(
            _of_each(network, len(seeds)),
            tokens=shape[0] * shape[1] // config.transformer.patch_size**2,
            pictures=len(seeds),
        ),
        text,
        mask,
        sampler.guidance_scale,
        share=share,
        modulate_attention=settings.attention_modulation,
    )

    def noise(draw: int) -> mx.array:
        return mx.concatenate([get_noise(seed, *shape, draw) for seed in seeds])

    schedule = get_schedule(sampler.num_inference_steps, settings.time_shift)
    fresh_noise = noise if sampler.fresh_noise else None
    yield from denoise(velocity, noise(0), schedule, fresh_noise, start=start)


def _of_each(network: Callable[..., mx.array], pictures: int) -> Callable[..., mx.array]:
    """`network` for a batch of pictures at one noise level, each computed as it is alone."""
    if pictures == 1:
        return network

    def call(*inputs: mx.array, **settings: Any) -> mx.array:
        with apart(pictures):
            return network(*inputs, **settings)

    return call


def in_mode(
    network: EfficientDiT, settings: DrawSettings, *, config: ModelConfig, adapter: str = FEW_STEP
) -> Callable[..., mx.array]:
    """`network` with its few-step adapter, unless merged, switched on or off by `settings`."""
    if config.few_step is None or adapter not in get_lora_weights(network):
        return network
    return with_lora_weights(network, {adapter: float(bool(settings.few_step))})


def draw_latents(
    components: Components,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: DrawSettings | None = None,
    share: float = 1.0,
    network: Callable[..., mx.array] | None = None,
    adapter: str = FEW_STEP,
    progress: Progress | None = None,
) -> mx.array:
    """Latents (B, h, w, C) of one picture for each prompt, all in one batch.

    Args:
        components: the model.
        settings: everything except prompts and seeds; None uses the model's defaults.
        network: computes the velocity instead of the model's transformer.
        adapter: name of the few-step mode's adapter in the transformer.
        progress: see `last_step`.

    Raises:
        UserError: the model does not have the width `share`, or does not support the settings.
    """
    config = components.config
    config.transformer.width_index(share)
    settings = (settings or DrawSettings()).resolved(config)
    # One by one: the states of a prompt depend on the size of its batch.
    texts = [
        encode_for(
            settings,
            [prompt],
            config=config,
            encode=lambda some: encode_prompts(
                some, components.text_encoders, transformer=components.transformer
            ),
        )
        for prompt in prompts
    ]
    steps = denoise_latents(
        network or in_mode(components.transformer, settings, config=config, adapter=adapter),
        *batch_texts(texts),
        seeds=seeds,
        settings=settings,
        config=config,
        share=share,
    )
    return last_step(steps, progress).x_t


def decode_together(autoencoder: Autoencoder, latents: Sequence[mx.array]) -> list[mx.array]:
    """The pictures (1, H, W, C) of the first of some latents (1, h, w, C), the same as alone.

    On a CPU, small pictures are decoded one on each core; otherwise it is one picture.
    """
    pixels = latents[0][0, ..., 0].size * autoencoder.config.downsampling**2
    count = streams() if pixels <= MOST_AT_ONCE else 1
    return each_on_a_core([functools.partial(autoencoder.decode, x) for x in latents[:count]])


def to_pictures(
    autoencoder: Autoencoder, latents: mx.array, progress: Progress | None = None
) -> Iterator[np.ndarray]:
    """Latents (B, h, w, C) -> B arrays (1, H, W, C) of uint8, by `decode_together`.

    Args:
        progress: see `last_step`.
    """
    rest = latents.split(len(latents))
    while rest:
        decoded = decode_together(autoencoder, rest)
        rest = rest[len(decoded) :]
        for picture in decoded:
            yield to_uint8(picture)
            if progress is not None:
                progress(1 - DENOISING)


def draw_pictures(
    components: Components,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: DrawSettings | None = None,
    share: float = 1.0,
    adapter: str = FEW_STEP,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Draw one picture for each prompt; arguments are those of `draw_latents`.

    Args:
        batch_size: pictures per batch.

    Returns:
        uint8 (B, H, W, 3), RGB; of a model with alpha (B, H, W, 4), the colors times alpha.

    Raises:
        UserError: as `draw_latents`, or pictures that are not finite.
    """
    pictures = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        latents = draw_latents(
            components,
            prompts[chunk],
            seeds=seeds[chunk],
            settings=settings,
            share=share,
            adapter=adapter,
            progress=progress,
        )
        pictures += to_pictures(components.autoencoder, latents, progress)
    return np.concatenate(pictures)
