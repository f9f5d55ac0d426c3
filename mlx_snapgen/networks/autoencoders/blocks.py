"""Residual blocks of the convolutional autoencoder."""

import mlx.core as mx
import mlx.nn as nn


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
