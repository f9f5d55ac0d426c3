"""Run the decoder of a family with group norms layer by layer, each layer in tiles.

A group norm uses statistics of the whole picture, so the picture cannot be decoded tile by tile.
But a norm with known statistics is a factor and an offset for each channel, and what is between two
norms, a convolution, is local. The result is the same as at once, except for rounding.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.autoencoders.residual import Level, ResidualBlock
from mlx_snapgen.networks.autoencoders.tiling import Stage, run_stages
from mlx_snapgen.networks.exponentials import silu

TILE = 128
"""Side of a tile in pixels of a layer's input. On the CPU, which unfolds the input of a
convolution, a tile of 512 channels then takes 300 MB."""


def run_level(level: Level, x: mx.array, *, tile: int = TILE) -> mx.array:
    """`level(x)` in tiles. They are evaluated one by one."""
    for block in level.resnets:
        x = _run_block(block, x, tile=tile)
    for upsample in level.get("upsamplers", []):
        # Its convolution runs on tiles of twice the side.
        x = run_stages([Stage(upsample, 2, 1)], x, tile=-(-tile // 2))
        mx.eval(x)
    return x


def run_convolution(norm: Any, conv: nn.Module, x: mx.array, *, tile: int = TILE) -> mx.array:
    """`conv(silu(norm(x)))` in tiles, for a 3x3 convolution; evaluated."""
    factor, offset = _as_factor_and_offset(norm, x, rows=max(1, tile**2 // x.shape[2]))

    def run(part: mx.array) -> mx.array:
        return conv(silu(part * factor + offset))

    x = run_stages([Stage(run, 1, 1)], x, tile=tile)
    mx.eval(x)
    return x


def _run_block(block: ResidualBlock, x: mx.array, *, tile: int) -> mx.array:
    h = run_convolution(block.norm1, block.conv1, x, tile=tile)
    h = run_convolution(block.norm2, block.conv2, h, tile=tile)
    h = h + (block.conv_shortcut(x) if "conv_shortcut" in block else x)
    mx.eval(h)
    return h


def _as_factor_and_offset(norm: Any, x: mx.array, *, rows: int) -> tuple[mx.array, mx.array]:
    """The group norm of x (B, H, W, C) as `x * factor + offset`, both (B, 1, 1, C) in float32.

    Args:
        rows: number of rows of the picture that are read at a time.
    """
    b, height, width, channels = x.shape
    groups = norm.num_groups

    def mean_of(function: Callable[[mx.array], mx.array]) -> mx.array:
        total = mx.zeros((b, 1, groups, 1))
        for i in range(0, height, rows):
            part = x[:, i : i + rows].reshape(b, -1, groups, channels // groups)
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
