"""Run a convolutional decoder tile by tile, with the same result as on the whole picture.

Tiles have a margin as wide as the network's receptive field. After each stage the margin is trimmed
to what the following stages need. This removes the pixels that the cut has changed, so there are no
seams to blend, and the expensive last stages compute almost nothing twice.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

TILE = 32
"""Default side of a tile in latents: 256 pixels.

On the CPU, which unfolds the input of a convolution, the up-sampling half of Qwen-Image's decoder
then takes 2.3 GiB in float32 for pictures of any size. The other half is not tiled and takes 2.8
GiB at 2048 pixels.
"""


class Stage(NamedTuple):
    """A part of a decoder that is local: no attention, no statistics of the whole picture."""

    run: Callable[[mx.array], mx.array]
    """(B, H, W, C) -> (B, H * scale, W * scale, C')."""
    scale: int
    reach: int
    """Width, in output pixels, of the band along a cut whose values the cut changes."""


def upsample(x: mx.array) -> mx.array:
    """Nearest neighbor, twice the side: (B, H, W, C) -> (B, 2H, 2W, C)."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def run_stages(stages: Sequence[Stage], x: mx.array, *, tile: int | None) -> mx.array:
    """Chain the stages over x (B, H, W, C).

    Args:
        tile: longest side of a tile, in pixels of x. None, or a value that x fits into, runs x as a
            whole. Tiles are evaluated one by one, so a tiled call cannot be compiled or
            differentiated.
    """
    _, h, w, _ = x.shape
    if tile is None or max(h, w) <= tile:
        for stage in stages:
            x = stage.run(x)
        return x
    # Margin that each stage's output needs, the last one's first.
    needs = [0]
    for stage in reversed(stages):
        needs.append(math.ceil((needs[-1] + stage.reach) / stage.scale))
    margin, *needs = reversed(needs)
    rows = []
    for top, bottom in _spans(h, tile):
        row = []
        for left, right in _spans(w, tile):
            sides = [min(margin, room) for room in (top, h - bottom, left, w - right)]
            part = x[:, top - sides[0] : bottom + sides[1], left - sides[2] : right + sides[3]]
            row.append(_run_tile(stages, part, sides=sides, needs=needs))
            mx.eval(row[-1])
        rows.append(mx.concatenate(row, axis=2))
    return mx.concatenate(rows, axis=1)


def _run_tile(
    stages: Sequence[Stage], x: mx.array, *, sides: Sequence[int], needs: Sequence[int]
) -> mx.array:
    """One tile with margins of `sides` pixels: top, bottom, left and right."""
    for stage, need in zip(stages, needs, strict=True):
        x = stage.run(x)
        _, h, w, _ = x.shape
        wide = [side * stage.scale for side in sides]
        # A narrower margin ends at the edge of the picture, where nothing was cut.
        sides = [min(need, side) for side in wide]
        top, bottom, left, right = (a - b for a, b in zip(wide, sides, strict=True))
        x = x[:, top : h - bottom, left : w - right]
    return x


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """[0, length) in even pieces of at most `tile`."""
    count = math.ceil(length / tile)
    cuts = [round(i * length / count) for i in range(count + 1)]
    return list(itertools.pairwise(cuts))
