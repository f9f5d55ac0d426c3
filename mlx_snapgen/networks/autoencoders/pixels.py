"""No autoencoder, for networks that draw pixels: latents are pictures in another scale."""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder


class Unchanged(nn.Module):
    """Encoder without a variance."""

    def __call__(self, pictures: mx.array) -> tuple[mx.array, None]:
        return pictures, None


class PixelAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "pixels"; it has no weights."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, encoder=Unchanged(), decoder=nn.Identity())
