"""Public autoencoders against diffusers, for `convert.parity`."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.parity.originals import dc_ae, fill, flux2_vae, kl_vae, library, qwen_image_vae
from convert.parity.transformers import Pairs
from mlx_snapgen.public.keys.autoencoders import read_autoencoder


def make_qwen_image_vae(folder: Path) -> None:
    qwen_image_vae().save_pretrained(folder)


def make_flux2_vae(folder: Path) -> None:
    flux2_vae().save_pretrained(folder)


def make_kl_vae(folder: Path) -> None:
    kl_vae().save_pretrained(folder)


def make_dc_ae(folder: Path) -> None:
    # Its own are too small for the attention to have an effect.
    fill(dc_ae()).save_pretrained(folder)


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


def compare_flux2_vae(folder: Path) -> Pairs:
    """diffusers normalizes the latents in its pipeline: patches of 2x2 as channels."""
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.AutoencoderKLFlux2.from_pretrained(folder).float().eval()
    pipeline, bn = diffusers.Flux2KleinPipeline, theirs.bn
    mean = bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
    ours = read_autoencoder(folder)
    picture, latents = _picture_and_latents(ours.config.latent_channels)
    picture, latents = np.tile(picture[:, :32], (1, 2, 2, 1)), np.tile(latents, (1, 2, 2, 1))
    with torch.no_grad():
        encoded = theirs.encode(_channels_first(picture)).latent_dist.mode()
        encoded = (pipeline._patchify_latents(encoded) - mean) / std
        patches = pipeline._patchify_latents(_channels_first(latents))
        decoded = theirs.decode(pipeline._unpatchify_latents(patches * std + mean)).sample
    encoded = pipeline._unpatchify_latents(encoded)
    yield "encode", ours.encode(mx.array(picture)), encoded.permute(0, 2, 3, 1)
    yield "decode", ours.decode(mx.array(latents)), decoded.permute(0, 2, 3, 1)


def compare_dc_ae(folder: Path) -> Pairs:
    diffusers, torch = library("diffusers"), library("torch")
    theirs = diffusers.AutoencoderDC.from_pretrained(folder).float().eval()
    scale, ours = theirs.config.scaling_factor, read_autoencoder(folder)
    rng = np.random.default_rng(0)
    # With fewer pixels than a head has channels, the original computes another product first.
    for height, width in ((64, 96), (256, 192)):
        picture = rng.uniform(-1, 1, (1, height, width, 3)).astype(np.float32)
        shape = (1, height // 32, width // 32, ours.config.latent_channels)
        latents = rng.normal(size=shape).astype(np.float32)
        with torch.no_grad():
            encoded = theirs.encode(_channels_first(picture)).latent * scale
            decoded = theirs.decode(_channels_first(latents) / scale).sample
        size = f"{height}x{width}"
        yield f"encode {size}", ours.encode(mx.array(picture)), encoded.permute(0, 2, 3, 1)
        yield f"decode {size}", ours.decode(mx.array(latents)), decoded.permute(0, 2, 3, 1)
