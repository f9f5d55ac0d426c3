"""Convolutional autoencoder: pictures (B, H, W, 3) in [-1, 1] <-> latents (B, H/f, W/f, C).

The factor f is 8 by default; with one more level in encoder and decoder it is 16.

The decoder is the tiny one that also runs on the phone. Every change of resolution is
space-to-depth (or back) around a linear layer: the same family of functions as a strided
(transposed) convolution, with fast gradients on every MLX backend.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import PLACE, AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import depth_to_space, space_to_depth, split

MIN_LOG_VAR = -12.0
"""Least logarithm of a latent's variance, and that of semantic latents."""
FREQUENCY = 2.8
"""Standard deviation of the frequencies of places, in radians: 1.5 waves between the edges of a
thing, which are at -1.7 and 1.7."""


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


class SemanticHead(nn.Module):
    """What is where: features (B, h, w, C) at the latents' scale -> (B, h, w, S)."""

    def __init__(self, channels: int, config: AutoencoderConfig):
        super().__init__()
        self.inp = nn.Linear(channels, channels)
        self.blocks = [ResidualBlock(channels) for _ in range(config.semantic_blocks)]
        self.out = nn.Linear(channels, config.semantic_channels)
        # The decoder's input does not change at first.
        self.out.weight = mx.zeros_like(self.out.weight)
        self.out.bias = mx.zeros_like(self.out.bias)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class SemanticTable(nn.Module):
    """What semantic latents mean at a place: (B, h, w, S) -> features (B, h, w, C).

    It is a table of rank R with a row for each code and a column for each place in a thing. `key`
    says which codes are there, with numbers near 1 or 0. Places are Fourier features (Tancik et al.
    2020, arXiv:2006.10739), from which networks learn details sooner than from coordinates.
    """

    def __init__(self, channels: int, config: AutoencoderConfig):
        super().__init__()
        keys, rank = config.semantic_keys, config.semantic_rank
        codes = config.semantic_channels - (PLACE.stop - PLACE.start)
        self.key = nn.Linear(codes, keys)
        self.things = nn.Linear(keys, rank)
        # Of one row or two at a time, so that their sums are about 1 in size.
        self.things.weight = mx.random.normal((rank, keys))
        self.waves = nn.Linear(2, rank // 4, bias=False)
        self.waves.weight = FREQUENCY * mx.random.normal(self.waves.weight.shape)
        self.places = nn.Linear(rank // 2, rank)
        self.out = nn.Linear(rank, channels)
        # The decoder does not change at first.
        self.out.weight = mx.zeros_like(self.out.weight)
        self.out.bias = mx.zeros_like(self.out.bias)

    def __call__(self, semantics: mx.array) -> mx.array:
        codes = mx.concatenate(
            [semantics[..., : PLACE.start], semantics[..., PLACE.stop :]], axis=-1
        )
        waves = self.waves(semantics[..., PLACE])
        places = self.places(mx.concatenate([mx.sin(waves), mx.cos(waves)], axis=-1))
        return self.out(self.things(mx.sigmoid(self.key(codes))) * places)


class Encoder(nn.Module):
    """Levels of residual blocks at 1/4, 1/8, ... of the picture's side.

    Level i has the blocks `blocks{i}`, after `patch` or `down`, `down2`, ... The last latents are
    those of `semantics`, if there are such: it learns without a change to the others.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.encoder_channels
        self.patch = nn.Linear(16 * config.picture_channels, channels[0])
        for i, (width, count) in enumerate(zip(channels, config.encoder_blocks, strict=True), 1):
            if i > 1:
                self[_down(i)] = nn.Linear(4 * channels[i - 2], width)
            self[f"blocks{i}"] = [ResidualBlock(width) for _ in range(count)]
        appearance = config.latent_channels - config.semantic_channels
        self.out = nn.Linear(channels[-1], 2 * appearance)
        if config.semantic_channels:
            self.semantics = SemanticHead(channels[-1], config)
        self._levels = len(channels)

    def projections(self) -> list[nn.Linear]:
        """The layers before each level, and the last one."""
        levels = range(2, self._levels + 1)
        return [self.patch, *(self[_down(i)] for i in levels), self.out]

    def __call__(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        x = self.patch(space_to_depth(pictures, 4))
        for i in range(1, self._levels + 1):
            if i > 1:
                x = self[_down(i)](space_to_depth(x, 2))
            for block in self[f"blocks{i}"]:
                x = block(x)
        mean, log_var = split(self.out(x), 2, axis=-1)
        if "semantics" in self:
            found = self.semantics(mx.stop_gradient(x))
            mean = mx.concatenate([mean, found], axis=-1)
            log_var = mx.concatenate([log_var, mx.full(found.shape, MIN_LOG_VAR)], axis=-1)
        return mean, mx.clip(log_var, MIN_LOG_VAR, 4.0)


def _down(level: int) -> str:
    """Name of the layer before a level from 2 on."""
    return "down" if level == 2 else f"down{level - 1}"


class Decoder(nn.Module):
    """Levels of residual blocks from the latents' side to 1/2 of the picture's side.

    Level i has the blocks `blocks{i}`, and `up{i}` after it.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels = config.decoder_channels
        self.inp = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        if config.semantic_rank:
            self.table = SemanticTable(channels[0], config)
        for i, (width, count) in enumerate(zip(channels, config.decoder_blocks, strict=True), 1):
            self[f"blocks{i}"] = [ResidualBlock(width) for _ in range(count)]
            if i < len(channels):
                self[f"up{i}"] = nn.Linear(width, 4 * channels[i])
        self.out = nn.Conv2d(channels[-1], 4 * config.picture_channels, 3, padding=1)
        self._levels, self._semantics = len(channels), config.semantic_channels

    def projections(self) -> list[nn.Linear | nn.Conv2d]:
        """The layer before the first level, those after each level, and the last one."""
        return [self.inp, *(self[f"up{i}"] for i in range(1, self._levels)), self.out]

    def __call__(self, latents: mx.array) -> mx.array:
        x = self.inp(latents)
        if "table" in self:
            x = x + self.table(latents[..., -self._semantics :])
        for i in range(1, self._levels + 1):
            for block in self[f"blocks{i}"]:
                x = block(x)
            if i < self._levels:
                x = depth_to_space(self[f"up{i}"](x), 2)
        return depth_to_space(self.out(x), 2)


class ConvolutionalAutoencoder(Autoencoder):
    """`AutoencoderConfig.kind` "convolutional"."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config, encoder=Encoder(config), decoder=Decoder(config))
