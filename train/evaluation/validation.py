"""Flow validation loss: the error of the predicted velocity on fixed latents, noise and levels."""

import hashlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.networks.efficient_dit import encode_prompts
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.sampling import add_noise, get_noise
from train.data.source import PictureSource

NUM_LEVELS = 8


@dataclass(frozen=True)
class ValidationSet:
    """Latents and noise of the validation loss, the same for every width.

    Attributes:
        latents, noise: (N, h, w, C).
        captions: one for each.
    """

    latents: mx.array
    noise: mx.array
    captions: list[str]


def validation_set(components: Components, source: PictureSource, *, count: int) -> ValidationSet:
    """The first `count` pictures of a source. Noise depends on a picture's index and caption."""
    with announce("drawing the validation set ..."):
        pictures, captions = source.batch(0, count)
    starts = tqdm(range(0, count, 16), desc="validation set", unit="batch", leave=False)
    latents = mx.concatenate(
        [components.autoencoder.encode(from_uint8(pictures[k : k + 16])) for k in starts]
    )
    seeds = [noise_seed(k, caption) for k, caption in enumerate(captions)]
    noise = mx.concatenate([get_noise(seed, *latents.shape[1:]) for seed in seeds])
    return ValidationSet(latents, noise, captions)


def noise_seed(index: int, caption: str) -> int:
    """The seed, in [0, 2^32), of one validation sample's noise."""
    digest = hashlib.blake2b(f"{index}|{caption}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def validation_losses(
    components: Components, data: ValidationSet, *, share: float, batch_size: int = 32
) -> list[float]:
    """Mean squared error of the velocity at the noise levels (k + .5) / NUM_LEVELS."""
    sums = np.zeros(NUM_LEVELS)
    for start in range(0, len(data.captions), batch_size):
        chosen = slice(start, start + batch_size)
        captions = data.captions[chosen]
        text, mask = encode_prompts(
            captions, components.text_encoders, transformer=components.transformer
        )
        x0, eps = data.latents[chosen], data.noise[chosen]
        for k in range(NUM_LEVELS):
            sigma = (k + 0.5) / NUM_LEVELS
            x_t = add_noise(x0, eps, sigma).astype(text.dtype)
            v = components.transformer(x_t, mx.full((len(x0),), sigma), text, mask, share=share)
            error = (v.astype(mx.float32) - (eps - x0)).square().mean(axis=(1, 2, 3))
            sums[k] += error.sum().item()
    return (sums / len(data.captions)).tolist()
