"""PyTorch networks for `mlx_snapgen.benchmark --suite peers`: one step with random weights.

They are the twins of our presets, and public transformers, as diffusers computes them. Each takes
its own latents of a picture.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from convert.libraries import require
from convert.parity.originals import library
from convert.pytorch.efficient_dit import EfficientDiT
from mlx_snapgen.measure import TWIN
from mlx_snapgen.presets import preset_autoencoder, transformer_preset

SANA = {
    "sana-0.6b": {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "sana-1.6b": {},
}
"""Fields of diffusers' SanaTransformer2DModel that differ from its defaults."""

PIXART = {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False}
"""The same of PixArtTransformer2DModel, for PixArt-Sigma."""


class Peer(NamedTuple):
    """A network, and how to call it."""

    network: Any
    channels: int
    """Of the latents."""
    downsampling: int
    text_shape: tuple[int, ...]
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Latents, t (1,) in [0, 1] and text -> velocity."""


def _twin(name: str, size: tuple[int, int], text_tokens: int) -> Peer:
    preset = name.removesuffix(TWIN)
    config = transformer_preset(preset).standalone(1.0)
    side = preset_autoencoder(preset).downsampling
    network = EfficientDiT(config, (size[0] // side, size[1] // side))
    text = (1, config.text_width, 1, text_tokens)
    return Peer(network, config.latent_channels, side, text, network)


def _sana(name: str, size: tuple[int, int], text_tokens: int) -> Peer:
    network = library("diffusers").SanaTransformer2DModel(**SANA[name])
    text = (1, text_tokens, network.config.caption_channels)

    def call(latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return network(latents, text, 1000 * t, return_dict=False)[0]

    return Peer(network, network.config.in_channels, 32, text, call)


def _pixart(name: str, size: tuple[int, int], text_tokens: int) -> Peer:
    network = library("diffusers").PixArtTransformer2DModel(**PIXART)
    text = (1, text_tokens, network.config.caption_channels)

    def call(latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return network(latents, text, 1000 * t, return_dict=False)[0]

    return Peer(network, network.config.in_channels, 8, text, call)


PUBLIC = dict.fromkeys(SANA, _sana) | {"pixart-sigma": _pixart}


def make_peer(
    name: str, *, height: int, width: int, dtype: str, text_tokens: int, gpu: bool
) -> tuple[int, Callable[[], Any]]:
    """Number of weights of a network, and a function that runs one step and waits for its result.

    Args:
        name: key of `PUBLIC`, or a preset with `TWIN` at its end.
        height, width: of the picture in pixels.
        dtype: of weights and activations, such as "bfloat16".
        gpu: run on the GPU, Apple's or NVIDIA's, instead of the CPU.

    Raises:
        UserError: diffusers is not installed.
    """
    if name in PUBLIC:
        require("parity", "diffusers")
    if (threads := os.environ.get("OPENBLAS_NUM_THREADS", "")).isdigit():
        torch.set_num_threads(max(1, int(threads)))  # as ours
    peer = PUBLIC.get(name, _twin)(name, (height, width), text_tokens)
    device = "cpu" if not gpu else "mps" if torch.backends.mps.is_available() else "cuda"
    how: Any = {"device": device, "dtype": getattr(torch, dtype)}
    # diffusers' own `to` prints a warning.
    torch.nn.Module.to(peer.network.eval().requires_grad_(False), **how)
    size = (height // peer.downsampling, width // peer.downsampling)
    latents = torch.randn(1, peer.channels, *size).to(**how)
    text, t = torch.randn(peer.text_shape).to(**how), torch.full((1,), 0.5, device=device)

    def run() -> float:
        with torch.inference_mode():
            # Reading a number waits for the device.
            return peer.call(latents, t, text).flatten()[0].item()

    return sum(p.numel() for p in peer.network.parameters()), run
