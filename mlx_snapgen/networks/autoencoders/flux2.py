"""FLUX.2's autoencoder (diffusers' AutoencoderKLFlux2).

The network is that of Flux with 32 channels. The latents are normalized by the running statistics
of a batch norm, which sees patches of 2x2 latents as one pixel of 128 channels.
"""

import mlx.core as mx

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.kl import KL
from mlx_snapgen.networks.autoencoders.layerwise import run_convolution, run_level
from mlx_snapgen.networks.autoencoders.residual import Decoder, Encoder
from mlx_snapgen.networks.autoencoders.tiling import TILE
from mlx_snapgen.networks.layers import pack, unpack
from mlx_snapgen.networks.rope import token_grid

FLUX2 = KL._replace(latent_layers=True)

PATCH = 2


class Flux2Decoder(Decoder):
    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3).

        Args:
            tile: latents with a longer side are decoded layer by layer, each layer in tiles, which
                cannot be compiled or differentiated; None decodes at once.
        """
        if tile is None or max(latents.shape[1:3]) <= tile:
            return super().__call__(latents)
        x = self.mid_block(self.conv_in(self.post_quant_conv(latents)), in_turn=True)
        for level in self.up_blocks:
            x = run_level(level, x)
        return run_convolution(self.conv_norm_out, self.conv_out, x)


class Flux2Autoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "flux2"; latents have an even height and width."""

    def __init__(self, config: AutoencoderConfig):
        encoder, decoder = Encoder(config, family=FLUX2), Flux2Decoder(config, family=FLUX2)
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
