"""Run a convolutional network tile by tile, with the same result as on the whole picture.

Tiles have a margin as wide as the network's receptive field. After each stage the margin is trimmed
to what the following stages need. This removes the pixels that the cut has changed, so there are no
seams to blend, and the expensive last stages compute almost nothing twice.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx

TILE = 32
"""Default side of a tile in latents: 256 pixels.

On the CPU, which unfolds the input of a convolution, the up-sampling half of Qwen-Image's decoder
then takes 2.3 GiB in float32 for pictures of any size. The other half is not tiled and takes 2.8
GiB at 2048 pixels.
"""


class Stage(NamedTuple):
    """A part of a network that is local: no attention, no statistics of the whole picture."""

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
    if tile is None or max(x.shape[1:3]) <= tile:
        for stage in stages:
            x = stage.run(x)
        return x
    return mx.concatenate(list(run_bands(stages, Bands([x]), tile=tile)), axis=1)


class Bands:
    """A picture (B, H, W, C) in bands of rows, which are freed from the top as they are used."""

    def __init__(self, bands: Iterable[mx.array] = ()):
        self.bottom = self._top = 0
        self._bands: list[mx.array] = []
        for band in bands:
            self.append(band)

    def append(self, band: mx.array) -> None:
        """Add rows (B, h, W, C) below, evaluated."""
        mx.eval(band)
        self._bands.append(band)
        self.bottom += band.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C), of which H counts freed rows too."""
        b, _, w, c = self._bands[0].shape
        return b, self.bottom, w, c

    def part(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> mx.array:
        """Rows `top` to `bottom` and columns `left` to `right` of the picture."""
        parts, start = [], self._top
        for band in self._bands:
            end = start + band.shape[1]
            if top < end and start < bottom:
                parts.append(band[:, max(0, top - start) : bottom - start, left:right])
            start = end
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def free(self, row: int) -> None:
        """Free the bands that are completely above `row`, and what MLX keeps of freed arrays."""
        while self._bands and self._top + self._bands[0].shape[1] <= row:
            self._top += self._bands.pop(0).shape[1]
        mx.clear_cache()


def run_bands(
    stages: Sequence[Stage], x: Bands, *, tile: int, keep: bool = False
) -> Iterator[mx.array]:
    """The rows of tiles of `run_stages`, from the top; evaluated.

    Args:
        keep: keep all rows of x. If false, a row is freed when no later band needs it, before the
            next band is computed.
    """
    _, h, w, _ = x.shape
    # Margin that each stage's output needs, the last one's first.
    needs = [0]
    for stage in reversed(stages):
        needs.append(math.ceil((needs[-1] + stage.reach) / stage.scale))
    margin, *needs = reversed(needs)
    for top, bottom in spans(h, tile):
        row = []
        for left, right in spans(w, tile):
            sides = [min(margin, room) for room in (top, h - bottom, left, w - right)]
            part = x.part(top - sides[0], bottom + sides[1], left - sides[2], right + sides[3])
            row.append(_run_tile(stages, part, sides=sides, needs=needs))
            mx.eval(row[-1])
        part, row = None, mx.concatenate(row, axis=2)
        mx.eval(row)
        yield row
        if not keep:
            x.free(bottom - margin)


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


def spans(length: int, tile: int) -> list[tuple[int, int]]:
    """[0, length) in even pieces of at most `tile`."""
    count = math.ceil(length / tile)
    cuts = [round(i * length / count) for i in range(count + 1)]
    return list(itertools.pairwise(cuts))
