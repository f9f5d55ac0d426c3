"""The autoencoder of Flux and Z-Image (diffusers' AutoencoderKL).

Group norms use statistics of the whole picture, so the decoder runs layer by layer, each in tiles.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.layerwise import TiledEncoder, run_layers
from mlx_snapgen.networks.autoencoders.residual import Decoder, Family
from mlx_snapgen.networks.autoencoders.tiling import TILE

NUM_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6, pytorch_compatible=True)


KL = Family(
    norm=group_norm,
    last_norm="conv_norm_out",
    flat=False,
    halving=False,
    latent_layers=False,
    tiled=False,
)


class KLDecoder(Decoder):
    """The decoder of Flux and of FLUX.2."""

    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3).

        Args:
            tile: latents with a longer side are decoded layer by layer, each layer in tiles, which
                cannot be compiled or differentiated; None decodes at once.
        """
        if tile is None or max(latents.shape[1:3]) <= tile:
            return super().__call__(latents)
        x = self.post_quant_conv(latents) if "post_quant_conv" in self else latents
        x = self.mid_block(self.conv_in(x), in_turn=True)
        return run_layers(self.up_blocks, x, norm=self.conv_norm_out, conv=self.conv_out)


class KLAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "kl"."""

    def __init__(self, config: AutoencoderConfig):
        encoder, decoder = TiledEncoder(config, family=KL), KLDecoder(config, family=KL)
        super().__init__(config, encoder=encoder, decoder=decoder)
