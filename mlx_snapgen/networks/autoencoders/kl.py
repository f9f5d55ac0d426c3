"""The autoencoder of Flux and Z-Image (diffusers' AutoencoderKL).

Group norms use statistics of the whole picture, so latents are never decoded in tiles.
"""

import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.residual import Decoder, Encoder, Family

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


class KLAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "kl"."""

    def __init__(self, config: AutoencoderConfig):
        encoder, decoder = Encoder(config, family=KL), Decoder(config, family=KL)
        super().__init__(config, encoder=encoder, decoder=decoder)
