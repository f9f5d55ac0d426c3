"""The autoencoder of Flux and Z-Image, f8 with 16 channels (diffusers' AutoencoderKL).

Like Qwen-Image's for single pictures, but with group norms. Those take the whole picture's
statistics, so it is never decoded in tiles. Module names are the public ones.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.qwen_image import (
    AttentionBlock,
    Downsample,
    MidBlock,
    ResidualBlock,
    check_levels,
)
from mlx_snapgen.networks.autoencoders.tiling import upsample

NUM_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6, pytorch_compatible=True)


class GroupedResidual(ResidualBlock):
    def __init__(self, in_channels: int, channels: int):
        super().__init__(in_channels, channels)
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(channels)


class GroupedAttention(AttentionBlock):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.norm = group_norm(channels)


class GroupedMid(MidBlock):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.resnets = [GroupedResidual(channels, channels) for _ in range(2)]
        self.attentions = [GroupedAttention(channels)]


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(upsample(x))


class Level(nn.Module):
    """Residual blocks of one resolution, and what leads to the next."""

    def __init__(self, in_channels: int, channels: int, count: int, **samplers: nn.Module):
        super().__init__()
        self.resnets = [
            GroupedResidual(channels if i else in_channels, channels) for i in range(count)
        ]
        for name, sampler in samplers.items():
            setattr(self, name, [sampler])

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.resnets:
            x = block(x)
        for name in ("downsamplers", "upsamplers"):
            if name in self:
                x = self[name][0](x)
        return x


class KLEncoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        check_levels("encoder", config.encoder_channels, config.encoder_blocks)
        channels = config.encoder_channels[0]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down_blocks = []
        for i, count in enumerate(config.encoder_blocks):
            before, channels = channels, config.encoder_channels[i]
            samplers = {"downsamplers": Downsample(channels)} if i < 3 else {}
            self.down_blocks.append(Level(before, channels, count, **samplers))
        self.mid_block = GroupedMid(channels)
        self.conv_norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def __call__(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) -> mean and log-variance of the latents, each (B, H/8, W/8, C)."""
        x = self.conv_in(pictures)
        for block in self.down_blocks:
            x = block(x)
        x = self.conv_out(nn.silu(self.conv_norm_out(self.mid_block(x))))
        mean, log_var = mx.split(x, 2, axis=-1)
        return mean, mx.clip(log_var, -30.0, 20.0)


class KLDecoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        check_levels("decoder", config.decoder_channels, config.decoder_blocks)
        channels = config.decoder_channels[0]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = GroupedMid(channels)
        self.up_blocks = []
        for i, count in enumerate(config.decoder_blocks):
            before, channels = channels, config.decoder_channels[i]
            samplers = {"upsamplers": Upsample(channels)} if i < 3 else {}
            self.up_blocks.append(Level(before, channels, count, **samplers))
        self.conv_norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def __call__(self, latents: mx.array) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3)."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class KLAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "kl"."""

    encoder_class, decoder_class = KLEncoder, KLDecoder
