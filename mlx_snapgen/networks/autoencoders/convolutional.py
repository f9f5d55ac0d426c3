"""Convolutional autoencoder, f8: pictures (B, H, W, 3) in [-1, 1] <-> latents (B, H/8, W/8, C).

The decoder is the tiny one that also runs on the phone. Every change of resolution is
space-to-depth (or back) around a linear layer: the same family of functions as a strided
(transposed) convolution, with fast gradients on every MLX backend.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import depth_to_space, space_to_depth


class ResidualBlock(nn.Module):
    """Channel RMS norm, then two 3x3 convolutions around a leaky ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.RMSNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # Starts as the identity.
        self.conv2.weight = mx.zeros_like(self.conv2.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv2(nn.leaky_relu(self.conv1(self.norm(x)), 0.1))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        quarter, eighth = config.encoder_channels
        self.patch = nn.Linear(16 * 3, quarter)
        self.blocks1 = [ResidualBlock(quarter) for _ in range(config.encoder_blocks[0])]
        self.down = nn.Linear(4 * quarter, eighth)
        self.blocks2 = [ResidualBlock(eighth) for _ in range(config.encoder_blocks[1])]
        self.out = nn.Linear(eighth, 2 * config.latent_channels)

    def __call__(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        x = self.patch(space_to_depth(pictures, 4))
        for block in self.blocks1:
            x = block(x)
        x = self.down(space_to_depth(x, 2))
        for block in self.blocks2:
            x = block(x)
        mean, log_var = mx.split(self.out(x), 2, axis=-1)
        return mean, mx.clip(log_var, -12.0, 4.0)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        eighth, quarter, half = config.decoder_channels
        self.inp = nn.Conv2d(config.latent_channels, eighth, 3, padding=1)
        self.blocks1 = [ResidualBlock(eighth) for _ in range(config.decoder_blocks[0])]
        self.up1 = nn.Linear(eighth, 4 * quarter)
        self.blocks2 = [ResidualBlock(quarter) for _ in range(config.decoder_blocks[1])]
        self.up2 = nn.Linear(quarter, 4 * half)
        self.blocks3 = [ResidualBlock(half) for _ in range(config.decoder_blocks[2])]
        self.out = nn.Conv2d(half, 4 * 3, 3, padding=1)

    def __call__(self, latents: mx.array) -> mx.array:
        x = self.inp(latents)
        for block in self.blocks1:
            x = block(x)
        x = depth_to_space(self.up1(x), 2)
        for block in self.blocks2:
            x = block(x)
        x = depth_to_space(self.up2(x), 2)
        for block in self.blocks3:
            x = block(x)
        return depth_to_space(self.out(x), 2)


class ConvolutionalAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "convolutional"."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, encoder=Encoder(config), decoder=Decoder(config))
