"""Public autoencoders against diffusers, for `convert.parity`."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.parity.transformers import Pairs
from convert.public.keys.autoencoders import read_autoencoder


def make_qwen_image_vae(folder: Path) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    network = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4
    )
    network.save_pretrained(folder)


def compare_qwen_image_vae(folder: Path) -> Pairs:
    import diffusers
    import torch

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
    found = mx.clip(ours.decode(mx.array(latents)), -1, 1)  # as the original does
    yield "decode", found, decoded[:, :, 0].permute(0, 2, 3, 1)


def _picture_and_latents(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture (1, 40, 72, 3) and normalised latents (1, 5, 9, channels)."""
    rng = np.random.default_rng(0)
    picture = rng.uniform(-1, 1, (1, 40, 72, 3)).astype(np.float32)
    return picture, rng.normal(size=(1, 5, 9, channels)).astype(np.float32)


def _channels_first(x: np.ndarray) -> Any:
    import torch

    return torch.tensor(x).permute(0, 3, 1, 2)


def make_kl_vae(folder: Path) -> None:
    import diffusers
    import torch

    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    network.save_pretrained(folder)


def compare_kl_vae(folder: Path) -> Pairs:
    import diffusers
    import torch

    theirs = diffusers.AutoencoderKL.from_pretrained(folder).float().eval()
    shift, scale = theirs.config.shift_factor or 0.0, theirs.config.scaling_factor
    ours = read_autoencoder(folder)
    picture, latents = _picture_and_latents(ours.config.latent_channels)
    with torch.no_grad():
        encoded = (theirs.encode(_channels_first(picture)).latent_dist.mode() - shift) * scale
        decoded = theirs.decode(_channels_first(latents) / scale + shift).sample
    yield "encode", ours.encode(mx.array(picture)), encoded.permute(0, 2, 3, 1)
    yield "decode", ours.decode(mx.array(latents)), decoded.permute(0, 2, 3, 1)
