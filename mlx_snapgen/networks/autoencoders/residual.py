"""Encoder and decoder of the public autoencoders with residual blocks, f8 with 16 channels.

`Family` lists the differences between Qwen-Image's and Flux's. Module names are the public ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.tiling import TILE, Stage, run_stages, upsample
from mlx_snapgen.networks.exponentials import silu
from mlx_snapgen.networks.layers import attend, split

MAX_SCORES = 2**26
"""Attention scores held at a time: 256 MiB in float32, where 2048 px would take 16 GiB."""

Norm = Callable[[int], nn.Module]
"""Number of channels -> a norm."""


class Family(NamedTuple):
    """What differs between the public autoencoders."""

    norm: Norm
    last_norm: str
    """Key of the norm before the last convolution."""
    flat: bool
    """The encoder's blocks are in one list, not in one `Level` for each resolution."""
    halving: bool
    """Up-sampling halves the channels."""
    latent_layers: bool
    """There are linear layers next to the latents, `quant_conv` and `post_quant_conv`."""
    tiled: bool
    """Large latents may be decoded in tiles. False if norms use statistics of the whole picture."""


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, *, norm: Norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if in_channels != channels:
            self.conv_shortcut = nn.Linear(in_channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        skip = self.conv_shortcut(x) if "conv_shortcut" in self else x
        x = self.conv1(silu(self.norm1(x)))
        return skip + self.conv2(silu(self.norm2(x)))


class AttentionBlock(nn.Module):
    """Single-head attention of every pixel to every pixel.

    The scores are computed in chunks. With `in_turn` each chunk is evaluated before the next one
    starts; otherwise MLX may keep several in memory.
    """

    def __init__(self, channels: int, *, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def __call__(self, x: mx.array, in_turn: bool = False) -> mx.array:
        b, h, w, c = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, 1, h * w, 3 * c)
        q, k, v = split(qkv, 3, axis=-1)
        rows = max(1, MAX_SCORES // (b * h * w))
        out = []
        for i in range(0, h * w, rows):
            piece = q[:, :, i : i + rows]
            out.append(attend(piece, k, v))
            if in_turn:
                mx.eval(out[-1])
        return x + self.proj(mx.concatenate(out, axis=2).reshape(b, h, w, c))


class MidBlock(nn.Module):
    def __init__(self, channels: int, *, norm: Norm):
        super().__init__()
        self.resnets = [ResidualBlock(channels, channels, norm=norm) for _ in range(2)]
        self.attentions = [AttentionBlock(channels, norm=norm)]

    def __call__(self, x: mx.array, in_turn: bool = False) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x), in_turn))


class Downsample(nn.Module):
    """Halves height and width; pads only below and on the right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(upsample(x))


class Level(nn.Module):
    """Residual blocks of one resolution, then the layer that changes to the next resolution, if
    any.

    Args:
        key: attribute that holds `sampler`, "downsamplers" or "upsamplers".
    """

    def __init__(self, resnets: list[ResidualBlock], key: str, *, sampler: nn.Module | None):
        super().__init__()
        self.resnets = resnets
        if sampler is not None:
            self[key] = [sampler]
        self._key = key

    def __call__(self, x: mx.array) -> mx.array:
        for block in [*self.resnets, *self.get(self._key, [])]:
            x = block(x)
        return x


def residual_blocks(
    in_channels: int, channels: int, *, count: int, norm: Norm
) -> list[ResidualBlock]:
    """`count` blocks, the first of which changes the channels."""
    return [
        ResidualBlock(channels if i else in_channels, channels, norm=norm) for i in range(count)
    ]


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, *, family: Family):
        super().__init__()
        check_levels("encoder", config.encoder_channels, blocks=config.encoder_blocks)
        channels, norm = config.encoder_channels[0], family.norm
        latents = 2 * config.latent_channels
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down_blocks: list[nn.Module] = []
        for i, count in enumerate(config.encoder_blocks):
            before, channels = channels, config.encoder_channels[i]
            blocks = residual_blocks(before, channels, count=count, norm=norm)
            sampler = Downsample(channels) if i < 3 else None
            if family.flat:
                self.down_blocks += blocks if sampler is None else [*blocks, sampler]
            else:
                self.down_blocks.append(Level(blocks, "downsamplers", sampler=sampler))
        self.mid_block = MidBlock(channels, norm=norm)
        self[family.last_norm] = norm(channels)
        self.conv_out = nn.Conv2d(channels, latents, 3, padding=1)
        if family.latent_layers:
            self.quant_conv = nn.Linear(latents, latents)
        self._last_norm = family.last_norm

    def __call__(self, pictures: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) -> mean and log-variance of the latents, each (B, H/8, W/8, C)."""
        x = self.conv_in(pictures)
        for block in self.down_blocks:
            x = block(x)
        return self.to_latents(x)

    def to_latents(self, x: mx.array, in_turn: bool = False) -> tuple[mx.array, mx.array]:
        """What comes after the last resolution; `in_turn` as in `AttentionBlock`."""
        x = self.mid_block(x, in_turn=in_turn)
        x = self.conv_out(silu(self[self._last_norm](x)))
        if "quant_conv" in self:
            x = self.quant_conv(x)
        mean, log_var = split(x, 2, axis=-1)
        return mean, mx.clip(log_var, -30.0, 20.0)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig, *, family: Family):
        super().__init__()
        check_levels("decoder", config.decoder_channels, blocks=config.decoder_blocks)
        channels, norm = config.decoder_channels[0], family.norm
        if family.latent_layers:
            self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = MidBlock(channels, norm=norm)
        self.up_blocks: list[Level] = []
        for i, count in enumerate(config.decoder_blocks):
            before, channels = channels, config.decoder_channels[i]
            blocks = residual_blocks(before, channels, count=count, norm=norm)
            sampler = None
            if i < 3:
                before, channels = channels, channels // 2 if family.halving else channels
                sampler = Upsample(before, channels)
            self.up_blocks.append(Level(blocks, "upsamplers", sampler=sampler))
        self[family.last_norm] = norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        self._last_norm, self._tiled = family.last_norm, family.tiled

    def __call__(self, latents: mx.array, tile: int | None = TILE) -> mx.array:
        """(B, h, w, C) -> (B, 8h, 8w, 3).

        Args:
            tile: longest side of a tile, in latents (see `run_stages`); None, and families that
                cannot be tiled, decode all at once. Attention runs at the resolution of the latents
                and always covers the whole picture.
        """
        tile = tile if self._tiled else None
        tiled = tile is not None and max(latents.shape[1:3]) > tile
        x = self.post_quant_conv(latents) if "post_quant_conv" in self else latents
        x = self.mid_block(self.conv_in(x), in_turn=tiled)
        return run_stages(self._stages(), x, tile=tile)

    def _stages(self) -> list[Stage]:
        *upward, last = self.up_blocks
        # Two 3x3 convolutions per block, and one after up-sampling or at the end.
        stages = [Stage(block, 2, 4 * len(block.resnets) + 1) for block in upward]
        return [
            *stages,
            Stage(lambda x: self._to_pixels(last(x)), 1, 2 * len(last.resnets) + 1),
        ]

    def _to_pixels(self, x: mx.array) -> mx.array:
        return self.conv_out(silu(self[self._last_norm](x)))


def check_levels(part: str, channels: Sequence[int], *, blocks: Sequence[int]) -> None:
    """`UserError` unless there are channels and blocks for four resolutions."""
    if len(channels) != 4 or len(blocks) != 4:
        raise UserError(
            f"this autoencoder has four resolutions: {part}_channels {tuple(channels)} and "
            f"{part}_blocks {tuple(blocks)} need four numbers each"
        )
