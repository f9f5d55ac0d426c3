"""Base class of all autoencoders: encode, decode, and normalization of the latents."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError


class Autoencoder(nn.Module):
    """Encoder and decoder with the latents normalized per channel in between.

    Args:
        encoder: pictures -> mean and log-variance of the latents, which may be None.
        decoder: latents -> pictures.
    """

    def __init__(self, config: AutoencoderConfig, *, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config = config
        self.encoder: Any = encoder
        self.decoder: Any = decoder

    def encode(self, pictures: mx.array, *, in_tiles: bool = False) -> mx.array:
        """Pictures (B, H, W, 3) in [-1, 1] -> normalized latents, see `latents`."""
        return self.normalize(self.latents(pictures, in_tiles=in_tiles))

    def latents(self, pictures: mx.array, *, in_tiles: bool = False) -> mx.array:
        """Pictures (B, H, W, 3) in [-1, 1] -> the decoder's input (B, H/f, W/f, C).

        f is `config.downsampling`. With semantic latents the encoder's own output has other
        channels.

        Args:
            in_tiles: encode a large picture in tiles if the encoder can (see `TiledEncoder`). This
                takes less memory, and cannot be compiled or differentiated.

        Raises:
            UserError: the height or width is no multiple of f.
        """
        _, h, w, _ = pictures.shape
        if h % self.config.downsampling or w % self.config.downsampling:
            factor = self.config.downsampling
            raise UserError(f"a picture of {h}x{w} pixels does not divide by {factor}")
        encoder = getattr(self.encoder, "in_tiles", self.encoder) if in_tiles else self.encoder
        mean, _ = encoder(pictures)
        return mean

    def decode(self, latents: mx.array) -> mx.array:
        """Normalized latents (B, h, w, C) -> pictures (B, f h, f w, 3), about [-1, 1]."""
        return self.decoder(self.denormalize(latents))

    def _statistics(self) -> tuple[mx.array, mx.array]:
        return mx.array(self.config.latents_mean or (0.0,)), mx.array(self.config.latents_std)

    def normalize(self, latents: mx.array) -> mx.array:
        """The decoder's input -> normalized latents."""
        if not self.config.latents_std:
            return latents
        mean, std = self._statistics()
        return (latents - mean) / std

    def denormalize(self, latents: mx.array) -> mx.array:
        """Normalized latents -> the decoder's input."""
        if not self.config.latents_std:
            return latents
        mean, std = self._statistics()
        return (latents * std.astype(latents.dtype)) + mean.astype(latents.dtype)
