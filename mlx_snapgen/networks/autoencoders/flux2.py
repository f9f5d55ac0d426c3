"""FLUX.2's autoencoder (diffusers' AutoencoderKLFlux2).

The network is that of Flux with 32 channels. The latents are normalized by the running statistics
of a batch norm, which sees patches of 2x2 latents as one pixel of 128 channels.
"""

import mlx.core as mx

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.kl import KL, KLDecoder
from mlx_snapgen.networks.autoencoders.layerwise import TiledEncoder
from mlx_snapgen.networks.layers import pack, unpack
from mlx_snapgen.networks.rope import token_grid

FLUX2 = KL._replace(latent_layers=True)

PATCH = 2


class Flux2Autoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "flux2"; latents have an even height and width."""

    def __init__(self, config: AutoencoderConfig):
        encoder, decoder = TiledEncoder(config, family=FLUX2), KLDecoder(config, family=FLUX2)
        super().__init__(config, encoder=encoder, decoder=decoder)

    def normalize(self, latents: mx.array) -> mx.array:
        """See `Autoencoder.normalize`; `UserError` for an odd height or width."""
        _, height, width, _ = latents.shape
        grid = token_grid(height, width, PATCH)
        return unpack(super().normalize(pack(latents, PATCH)), grid, patch=PATCH)

    def denormalize(self, latents: mx.array) -> mx.array:
        """See `Autoencoder.denormalize`; `UserError` for an odd height or width."""
        _, height, width, _ = latents.shape
        grid = token_grid(height, width, PATCH)
        return unpack(super().denormalize(pack(latents, PATCH)), grid, patch=PATCH)
