"""Convolutional autoencoder: pictures (B, H, W, 3) in [-1, 1] <-> latents (B, H/f, W/f, C).

Pictures with alpha have four channels, the colors times alpha. With `semantics.py` the last latents
are codes of what is where. The factor f is 8 by default; with one more level in encoder and decoder
it is 16.

The decoder is the tiny one that also runs on the phone. Every change of resolution is
space-to-depth (or back) around a linear layer: the same family of functions as a strided
(transposed) convolution, with fast gradients on every MLX backend.
"""

import dataclasses

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.blocks import ResidualBlock
from mlx_snapgen.networks.autoencoders.semantics import (
    Paint,
    SemanticHead,
    ThingTable,
    agreed,
    is_known,
    mended,
)
from mlx_snapgen.networks.layers import depth_to_space, space_to_depth, split
from mlx_snapgen.semantics import CHANNELS, SEEN_CHANNELS, SemanticConfig

MIN_LOG_VAR = -12.0
"""Least logarithm of a latent's variance, and that of semantic latents."""


class Encoder(nn.Module):
    """Levels of residual blocks at 1/4, 1/8, ... of the picture's side.

    Level i has the blocks `blocks{i}`, after `patch` or `down`, `down2`, ... The last channels are
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
        self.out = nn.Linear(channels[-1], 2 * config.appearance_channels)
        if config.semantics is not None:
            self.semantics = SemanticHead(channels[-1], config.semantics)
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
        self.inp = nn.Conv2d(config.appearance_channels, channels[0], 3, padding=1)
        if config.semantics is not None:
            self.table, self.paint = ThingTable(config.semantics), Paint(config.semantics)
            self._semantics = config.semantics
        for i, (width, count) in enumerate(zip(channels, config.decoder_blocks, strict=True), 1):
            self[f"blocks{i}"] = [ResidualBlock(width) for _ in range(count)]
            if i < len(channels):
                self[f"up{i}"] = nn.Linear(width, 4 * channels[i])
        self.out = nn.Conv2d(channels[-1], 4 * config.picture_channels, 3, padding=1)
        self._levels = len(channels)

    def projections(self) -> list[nn.Linear | nn.Conv2d]:
        """The layer before the first level, those after each level, and the last one."""
        return [self.inp, *(self[f"up{i}"] for i in range(1, self._levels)), self.out]

    def __call__(self, latents: mx.array) -> mx.array:
        if "table" not in self:
            return self.draw(latents)
        appearance, semantics = latents[..., :-CHANNELS], latents[..., -CHANNELS:]
        semantics = mended(semantics, self._semantics)
        appearance = mx.where(is_known(semantics), 0, appearance)
        known = self.table(semantics)
        missing = known.shape[-1] - appearance.shape[-1]
        appearance = mx.pad(appearance, [(0, 0)] * 3 + [(0, missing)])
        return self.paint(self.draw(known + appearance), semantics)

    def set_own(self, config: SemanticConfig, rows: mx.array) -> None:
        """See `ConvolutionalAutoencoder.set_own_things`."""
        self.table.set_own(config, rows)
        self.paint.set_own(config)
        self._semantics = config

    def draw(self, latents: mx.array) -> mx.array:
        """Pictures of latents of appearance."""
        x = self.inp(latents)
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

    def latents(self, pictures: mx.array, *, in_tiles: bool = False) -> mx.array:
        """See `Autoencoder.latents`; those of appearance are 0 where the semantic ones tell all."""
        found = super().latents(pictures, in_tiles=in_tiles)
        if self.config.semantics is None:
            return found
        appearance, seen = found[..., :-SEEN_CHANNELS], found[..., -SEEN_CHANNELS:]
        semantics = agreed(seen, self.config.semantics)
        count = self.config.latent_channels - CHANNELS
        other = (appearance - self.decoder.table.empty)[..., :count]
        return mx.concatenate([mx.where(is_known(semantics), 0, other), semantics], axis=-1)

    def own_things(self) -> tuple[tuple[int, ...], mx.array]:
        """Numbers of the codes of `SemanticConfig.own`, and their rows (N * places, A)."""
        config = self.config.semantics
        assert config is not None
        return config.own, self.decoder.table.own(config)

    def set_own_things(self, own: tuple[int, ...], rows: mx.array) -> None:
        """Replace the things that a user added by others, with these codes and rows."""
        assert self.config.semantics is not None
        semantics = dataclasses.replace(self.config.semantics, own=own)
        self.decoder.set_own(semantics, rows)
        self.config = dataclasses.replace(self.config, semantics=semantics)
