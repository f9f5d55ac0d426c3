"""Pictures of many prompts at once, for evaluation and for looks during training."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora import switched
from mlx_snapgen.sampler import denoise, get_noise, get_schedule, guided_velocity
from mlx_snapgen.text_encoder import encode_prompts
from mlx_snapgen.weights import FEW_STEP, Components


def to_pictures(decoded: mx.array) -> np.ndarray:
    """Decoded pictures (B, H, W, 3), about [-1, 1] -> uint8; a UserError if not finite."""
    if not mx.isfinite(decoded).all().item():
        raise UserError(
            "the model's pictures are not finite: its training has diverged, or it is damaged"
        )
    return np.array(mx.round((mx.clip(decoded, -1, 1) + 1) * 127.5).astype(mx.uint8))


def sample(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    width: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    time_shift: float | None = None,
    few_step: bool | None = None,
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
        batch_size: pictures at a time.
        progress: called with the number of pictures that were just finished.

    Returns:
        uint8 (B, H, W, 3), RGB.

    Raises:
        UserError: the model does not hold `width`, or its pictures are not finite.
    """
    config = components.config
    config.transformer.width_index(width)
    own = config.sampler_for(steps, few_step)
    steps = own.num_inference_steps if steps is None else steps
    guidance = own.guidance_scale if guidance is None else guidance
    schedule = get_schedule(steps, own.time_shift if time_shift is None else time_shift)
    pictures = []
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        latents = _latents(components, some, seeds[start:], width, guidance, schedule, own)
        pictures.append(to_pictures(components.autoencoder.decode(latents)))
        if progress is not None:
            progress(len(some))
    return np.concatenate(pictures)


def _latents(
    components: Components,
    prompts: list[str],
    seeds: Sequence[int],
    width: float,
    guidance: float,
    schedule: list[float],
    mode: SamplerConfig,
) -> mx.array:
    """Clean latents (B, h, w, C) of one batch."""
    config, transformer = components.config, components.transformer
    negative = [] if guidance == 1 else [""] * len(prompts)
    text, mask = encode_prompts(negative + prompts, components.text_encoders, transformer)
    mx.eval(text, mask)
    h, w = (side // config.autoencoder.downsampling for side in config.image_size)
    channels = config.autoencoder.latent_channels

    def draw(number: int) -> mx.array:
        return mx.concatenate(
            [get_noise(s, h, w, channels, number) for s, _ in zip(seeds, prompts, strict=False)]
        )

    network = transformer
    if config.few_step is not None:
        network = switched(transformer, {FEW_STEP: float(mode is config.few_step)})
    velocity = guided_velocity(network, text, mask, guidance, width=width)
    *_, last = denoise(velocity, draw(0), schedule, draw if mode.fresh_noise else None)
    return last.x_t
