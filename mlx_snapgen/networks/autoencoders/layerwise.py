"""Run an encoder, or the decoder of a family with group norms, layer by layer, each in tiles.

A group norm uses statistics of the whole picture, so the picture cannot run tile by tile.
But a norm with known statistics is a factor and an offset for each channel, and what is between two
norms, a convolution, is local. The result is the same as at once, except for rounding.

The features between two layers are those of the whole picture. A layer frees them band by band as
it computes its own, so that no two layers' features are in memory at once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.autoencoders.residual import Downsample, Encoder, Level, ResidualBlock
from mlx_snapgen.networks.autoencoders.tiling import Bands, Stage, run_bands, spans
from mlx_snapgen.networks.exponentials import silu

TILE = 128
"""Side of a tile in pixels of a layer's input. On the CPU, which unfolds the input of a
convolution, a tile of 512 channels then takes 300 MB."""


def run_layers(
    levels: Sequence[Level], x: mx.array, *, norm: Any, conv: nn.Module, tile: int = TILE
) -> mx.array:
    """The levels, then `conv(silu(norm(x)))`, in tiles; evaluated."""
    bands = Bands([x])
    for level in levels:
        for block in level.resnets:
            bands = _run_block(block, bands, tile=tile)
        for upsample in level.get("upsamplers", []):
            # Its convolution runs on tiles of twice the side.
            bands = Bands(run_bands([Stage(upsample, 2, 1)], bands, tile=-(-tile // 2)))
    return mx.concatenate(list(_run_convolution(norm, conv, bands, tile=tile)), axis=1)


class TiledEncoder(Encoder):
    """An encoder that can also take large pictures in tiles."""

    def in_tiles(self, pictures: mx.array, *, tile: int = TILE) -> tuple[mx.array, mx.array]:
        """As a call, but evaluated: more than 2 x 2 tiles run layer by layer, in tiles.

        Args:
            tile: longest side of a tile, in pixels of a layer's input.
        """
        if max(pictures.shape[1:3]) <= 2 * tile:
            return self(pictures)
        x = Bands(run_bands([Stage(self.conv_in, 1, 1)], Bands([pictures]), tile=tile))
        for level in self.down_blocks:
            blocks: list[Any] = [level]
            if isinstance(level, Level):
                blocks = [*level.resnets, *level.get("downsamplers", [])]
            for block in blocks:
                if isinstance(block, Downsample):
                    x = Bands(_halve(block, x, tile=tile))
                else:
                    x = _run_block(block, x, tile=tile)
        return self.to_latents(x.part(0, x.bottom), in_turn=True)


def _halve(block: Downsample, x: Bands, *, tile: int) -> Iterator[mx.array]:
    """The rows of tiles of `block`, whose pixels need two of x and the next one; evaluated."""
    _, h, w, _ = x.shape
    for top, bottom in spans(h // 2, tile // 2):
        row = []
        for left, right in spans(w // 2, tile // 2):
            # One row and one column more: no result depends on the padding that `block` adds.
            row.append(block(x.part(2 * top, 2 * bottom + 1, 2 * left, 2 * right + 1)))
            mx.eval(row[-1])
        row = mx.concatenate(row, axis=2)
        mx.eval(row)
        yield row
        x.free(2 * bottom)


def _run_block(block: ResidualBlock, x: Bands, *, tile: int) -> Bands:
    shortcut = block.get("conv_shortcut")
    h, skip, out = Bands(), x if shortcut is None else Bands(), Bands()
    for band in _run_convolution(block.norm1, block.conv1, x, tile=tile, keep=shortcut is None):
        if shortcut is not None:
            skip.append(shortcut(x.part(h.bottom, h.bottom + band.shape[1])))
        h.append(band)
    for band in _run_convolution(block.norm2, block.conv2, h, tile=tile):
        out.append(band + skip.part(out.bottom, out.bottom + band.shape[1]))
    return out


def _run_convolution(
    norm: Any, conv: nn.Module, x: Bands, *, tile: int, keep: bool = False
) -> Iterator[mx.array]:
    """`conv(silu(norm(x)))` for a 3x3 convolution (see `run_bands`)."""
    normalize = norm
    if isinstance(norm, nn.GroupNorm):
        factor, offset = _as_factor_and_offset(norm, x, rows=max(1, tile**2 // x.shape[2]))

        def normalize(part: mx.array) -> mx.array:
            return part * factor + offset

    return run_bands([Stage(lambda x: conv(silu(normalize(x))), 1, 1)], x, tile=tile, keep=keep)


def _as_factor_and_offset(norm: Any, x: Bands, *, rows: int) -> tuple[mx.array, mx.array]:
    """The group norm of x (B, H, W, C) as `x * factor + offset`, both (B, 1, 1, C) in float32.

    Args:
        rows: number of rows of the picture that are read at a time.
    """
    b, height, width, channels = x.shape
    groups = norm.num_groups

    def mean_of(function: Callable[[mx.array], mx.array]) -> mx.array:
        total = mx.zeros((b, 1, groups, 1))
        for i in range(0, height, rows):
            part = x.part(i, min(i + rows, height)).reshape(b, -1, groups, channels // groups)
            total = total + function(part.astype(mx.float32)).sum(axis=(1, 3), keepdims=True)
            mx.eval(total)
        return total / (height * width * channels // groups)

    mean = mean_of(lambda part: part)
    scale = mx.rsqrt(mean_of(lambda part: mx.square(part - mean)) + norm.eps)
    mean, scale = (
        mx.repeat(y.reshape(b, groups), channels // groups, axis=1)[:, None, None]
        for y in (mean, scale)
    )
    factor = scale * norm.weight
    return factor, norm.bias - mean * factor
