"""Public autoencoders against diffusers, for `convert.parity`."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.parity.originals import kl_vae, library, qwen_image_vae
from convert.parity.transformers import Pairs
from convert.public.keys.autoencoders import read_autoencoder


def make_qwen_image_vae(folder: Path) -> None:
    qwen_image_vae().save_pretrained(folder)


def make_kl_vae(folder: Path) -> None:
    kl_vae().save_pretrained(folder)


def compare_qwen_image_vae(folder: Path) -> Pairs:
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.AutoencoderKLQwenImage.from_pretrained(folder).float().eval()
    mean, std = (
        torch.tensor(v).view(1, -1, 1, 1, 1)
        for v in (theirs.config.latents_mean, theirs.config.latents_std)
    )
    ours = read_autoencoder(folder)
    picture, latents = _picture_and_latents(ours.config.latent_channels)

    def video(x: np.ndarray) -> Any:
        return _channels_first(x)[:, :, None]

    with torch.no_grad():
        encoded = (theirs.encode(video(picture)).latent_dist.mode() - mean) / std
        decoded = theirs.decode(video(latents) * std + mean).sample
    yield "encode", ours.encode(mx.array(picture)), encoded[:, :, 0].permute(0, 2, 3, 1)
    found = mx.clip(ours.decode(mx.array(latents)), -1, 1)  # like the original
    yield "decode", found, decoded[:, :, 0].permute(0, 2, 3, 1)


def _picture_and_latents(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (1, 40, 72, 3) and normalized latents (1, 5, 9, channels)."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(-1, 1, (1, 40, 72, 3)).astype(np.float32)
    return picture, rng.normal(size=(1, 5, 9, channels)).astype(np.float32)


def _channels_first(x: np.ndarray) -> Any:
    return library("torch").tensor(x).permute(0, 3, 1, 2)


def compare_kl_vae(folder: Path) -> Pairs:
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.AutoencoderKL.from_pretrained(folder).float().eval()
    shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
    ours = read_autoencoder(folder)
    picture, latents = _picture_and_latents(ours.config.latent_channels)
    with torch.no_grad():
        encoded = (theirs.encode(_channels_first(picture)).latent_dist.mode() - shift) * scale
        decoded = theirs.decode(_channels_first(latents) / scale + shift).sample
    yield "encode", ours.encode(mx.array(picture)), encoded.permute(0, 2, 3, 1)
    yield "decode", ours.decode(mx.array(latents)), decoded.permute(0, 2, 3, 1)
