"""Qwen-Image's autoencoder for single pictures (SnapGen++ section 2).

The public network (diffusers' AutoencoderKLQwenImage) is for video, with convolutions that are
causal in time. A picture is the first frame of a video, and only zeros precede it. So only the last
temporal slice of each 3-D kernel has an effect, and the convolutions that change the frame rate
never run. What remains is a 2-D network.
"""

import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.layerwise import TiledEncoder
from mlx_snapgen.networks.autoencoders.residual import Decoder, Family


def channel_norm(channels: int) -> nn.RMSNorm:
    """x / max(|x|, 1e-12) * sqrt(C) * gamma."""
    return nn.RMSNorm(channels, eps=1e-24)


QWEN = Family(
    norm=channel_norm,
    last_norm="norm_out",
    flat=True,
    halving=True,
    latent_layers=True,
    tiled=True,
)


class QwenAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "qwen-image"."""

    def __init__(self, config: AutoencoderConfig):
        encoder, decoder = TiledEncoder(config, family=QWEN), Decoder(config, family=QWEN)
        super().__init__(config, encoder=encoder, decoder=decoder)
