"""What all autoencoders share: encode, decode, and the latents' statistics."""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError


class Autoencoder(nn.Module):
    """Encoder and decoder with the latents normalised per channel in between.

    A kind of autoencoder is its two classes.
    """

    encoder_class: type[nn.Module]
    decoder_class: type[nn.Module]

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = self.encoder_class(config)
        self.decoder = self.decoder_class(config)

    def encode(self, pictures: mx.array) -> mx.array:
        """Pictures (B, H, W, 3) in [-1, 1] -> normalised latents (B, H/8, W/8, C).

        Raises:
            UserError: the height or width does not divide by 8.
        """
        _, h, w, _ = pictures.shape
        if h % self.config.downsampling or w % self.config.downsampling:
            raise UserError(f"a picture of {h}x{w} pixels does not divide by 8")
        mean, _ = self.encoder(pictures)
        return self._normalise(mean)

    def decode(self, latents: mx.array) -> mx.array:
        """Normalised latents (B, h, w, C) -> pictures (B, 8h, 8w, 3), about [-1, 1], unclipped."""
        return self.decoder(self.denormalise(latents))

    def _normalise(self, latents: mx.array) -> mx.array:
        if not self.config.latents_std:
            return latents
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (latents - mean) / std

    def denormalise(self, latents: mx.array) -> mx.array:
        """Normalised latents -> those that the decoder takes."""
        if not self.config.latents_std:
            return latents
        mean, std = mx.array(self.config.latents_mean), mx.array(self.config.latents_std)
        return (latents * std.astype(latents.dtype)) + mean.astype(latents.dtype)
