"""Parts of the convolutional autoencoder for semantic latents, see `mlx_snapgen.semantics`.

The decoder looks up how a known thing looks at a place, draws it in its own colors on transparent
ground, paints it pixel by pixel, and lays it over the background. Everything else is in the latents
of appearance.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.autoencoders.blocks import ResidualBlock
from mlx_snapgen.semantics import (
    COLOR,
    COLUMN,
    EDGE,
    GROUND,
    MIDDLE,
    PLACE,
    ROW,
    SEEN_CHANNELS,
    SIDE,
    THING,
    SemanticConfig,
    codes,
)

_PLACE_ERROR, _SIZE_ERROR = 0.2, 0.25
"""Usual errors of what an encoder says about the place and size, in the units of `PLACE`."""
_FIT, _MISS = 6.0, -3.0
"""Of a place in a square: what it adds if it says just that, and the least, as with no thing there.
Measured: all but .008 of the squares in 128 scenes are right then, .2 without the others' votes."""


def nearest(numbers: mx.array, count: int | None = None) -> tuple[mx.array, mx.array]:
    """The codes nearest to numbers (..., C), with 8 or 4 channels.

    Args:
        count: of the codes to choose from, the first ones; None: all.

    Returns:
        Indices, int32 (...), and whether the code is there, bool (...): within 60 degrees or so.
    """
    known = mx.array(codes(numbers.shape[-1])[:count])
    found = numbers.astype(mx.float32) @ known.T
    return mx.argmax(found, axis=-1).astype(mx.int32), mx.max(found, axis=-1) > known.shape[-1] / 2


def _known_codes(numbers: mx.array, count: int | None = None) -> mx.array:
    """Numbers (..., C) -> the nearest code, or 0."""
    index, is_there = nearest(numbers, count)
    return mx.where(is_there[..., None], mx.array(codes(numbers.shape[-1]))[index], 0)


def _positions(height: int, width: int) -> tuple[mx.array, mx.array]:
    """Columns (1, w) and rows (h, 1) of the latents."""
    return mx.arange(width)[None], mx.arange(height)[:, None]


def as_codes(seen: mx.array, config: SemanticConfig) -> mx.array:
    """What an encoder sees (B, h, w, `SEEN_CHANNELS`) -> semantic latents (B, h, w, S).

    Nothing is known about things whose edges have no code, more than 24 latents from the corner.
    """
    place = seen[..., PLACE].astype(mx.float32)
    kind = mx.argmin(mx.abs(place[..., 2:] - mx.log2(mx.array(config.sides) / MIDDLE)), axis=-1)
    side = mx.array(config.sides)[kind]
    places = mx.array(codes(SIDE.stop - SIDE.start))
    edges, is_near = [], mx.array(True)
    for i, here in enumerate(_positions(*seen.shape[1:3])):
        inside = mx.clip(mx.floor((place[..., i] / EDGE + 1) * 0.5 * side), 0, side - 1)
        edge = here - inside.astype(mx.int32)
        is_near = is_near & (edge < len(places))
        edges.append(places[mx.clip(edge, 0, len(places) - 1)])
    is_thing = nearest(seen[..., THING], config.things)[1]
    of_thing = [
        _known_codes(seen[..., THING], config.things),
        _known_codes(seen[..., COLOR]),
        *edges,
        places[kind],
    ]
    thing, color, *square = (mx.where((is_thing & is_near)[..., None], x, 0) for x in of_thing)
    ground = _known_codes(seen[..., GROUND])
    ground = mx.where((is_thing & ~is_near)[..., None], 0, ground)
    return mx.concatenate([thing, color, ground, *square], axis=-1).astype(seen.dtype)


def _windows(x: mx.array, side: int) -> mx.array:
    """All squares of maps (B, h, w, ...) -> (B, h - side + 1, w - side + 1, side, side, ...)."""
    strides = [1]
    for length in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * length)
    height, width = (length - side + 1 for length in x.shape[1:3])
    shape = (len(x), height, width, side, side, *x.shape[3:])
    return mx.as_strided(mx.contiguous(x), shape, [*strides[:3], *strides[1:]])


def _best_about(squares: mx.array, side: int) -> tuple[mx.array, mx.array, mx.array]:
    """The greatest of the squares (B, H, W) that hold a place (h, w), and its top and left edge."""
    edge = side - 1
    padded = mx.pad(squares, [(0, 0), (edge, edge), (edge, edge)], constant_values=-mx.inf)
    about = _windows(padded, side).flatten(3)
    chosen = mx.argmax(about, axis=-1).astype(mx.int32)
    columns, rows = _positions(*about.shape[1:3])
    return mx.max(about, axis=-1), rows - edge + chosen // side, columns - edge + chosen % side


def agreed(seen: mx.array, config: SemanticConfig) -> mx.array:
    """What an encoder sees (B, h, w, `SEEN_CHANNELS`) -> the same, where a thing's places agree.

    Each place votes for the square about it that fits best to what all places of the square say. A
    square with most of its places' votes is a thing, whose codes are their means. What is in no
    such square and looks like a thing is unknown.
    """
    found = seen.astype(mx.float32)
    is_thing = nearest(found[..., THING], config.things)[1]
    sides = [side for side in config.sides if side <= min(seen.shape[1:3])]
    best = mx.full(seen.shape[:3], -mx.inf)
    vote = [mx.zeros(seen.shape[:3], mx.int32)] * 3
    for side in sides:
        x, y, size = (_windows(found[..., i], side) for i in range(PLACE.start, PLACE.stop))
        line = EDGE * ((2 * mx.arange(side) + 1) / side - 1)
        misfit = ((x - line) ** 2 + (y - line[:, None]) ** 2) / _PLACE_ERROR**2
        misfit += (size - np.log2(side / MIDDLE)) ** 2 / _SIZE_ERROR**2
        fit = mx.where(_windows(is_thing, side), mx.maximum(_FIT - misfit, _MISS), _MISS)
        fit, *square = _best_about(fit.sum((-2, -1)), side)
        is_better = is_thing & (fit > best)
        best = mx.where(is_better, fit, best)
        vote = [mx.where(is_better, a, b) for a, b in zip([*square, side], vote, strict=True)]

    things = mx.zeros_like(found[..., : COLOR.stop])
    place = mx.zeros_like(found[..., PLACE])
    is_agreed = mx.zeros_like(is_thing)
    for side in sides:
        columns, rows = _positions(*(length - side + 1 for length in seen.shape[1:3]))
        square = (rows[..., None, None], columns[..., None, None], side)
        votes = [_windows(a, side) == b for a, b in zip(vote, square, strict=True)]
        share = (votes[0] & votes[1] & votes[2]).mean((-2, -1))
        most, top, left = _best_about(share, side)
        is_in = (most > 0.5)[..., None]
        is_agreed = is_agreed | is_in[..., 0]
        means = _windows(found[..., : COLOR.stop], side).mean((3, 4))
        index = mx.clip(top, 0, None) * means.shape[2] + mx.clip(left, 0, None)
        index = mx.minimum(index, means.shape[1] * means.shape[2] - 1)
        means = mx.take_along_axis(means.flatten(1, 2), index.flatten(1)[..., None], axis=1)
        things = mx.where(is_in, means.reshape(things.shape), things)
        columns, rows = _positions(*seen.shape[1:3])
        inside = [EDGE * ((2 * (a - b) + 1) / side - 1) for a, b in ((columns, left), (rows, top))]
        size = mx.full(left.shape, np.log2(side / MIDDLE))
        place = mx.where(is_in, mx.stack([*inside, size], axis=-1), place)
    ground = mx.where((is_thing & ~is_agreed)[..., None], 0, found[..., GROUND])
    return mx.concatenate([things, ground, place], axis=-1).astype(seen.dtype)


def is_known(semantics: mx.array) -> mx.array:
    """Where semantic latents (B, h, w, S) tell all that is to be seen, bool (B, h, w, 1)."""
    return nearest(semantics[..., GROUND])[1][..., None]


class SemanticHead(nn.Module):
    """What is where: features (B, h, w, C) of an encoder -> (B, h, w, `SEEN_CHANNELS`)."""

    def __init__(self, channels: int, config: SemanticConfig):
        super().__init__()
        self.inp = nn.Linear(channels, channels)
        self.blocks = [ResidualBlock(channels) for _ in range(config.head_blocks)]
        self.out = nn.Linear(channels, SEEN_CHANNELS)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class ThingTable(nn.Module):
    """How known things look: semantic latents (B, h, w, S) -> latents of appearance (B, h, w, A).

    `things` has a row for each thing, size and place in the thing; `empty` is what is elsewhere.
    """

    def __init__(self, config: SemanticConfig):
        super().__init__()
        self._count, self._sides = config.things, config.sides
        self._starts = np.cumsum([0, *(side**2 for side in config.sides)]).tolist()
        self.things = nn.Embedding(config.things * self._starts[-1], config.appearance_channels)
        self.empty = mx.zeros(config.appearance_channels)

    def rows(self, semantics: mx.array) -> tuple[mx.array, mx.array]:
        """Rows of the table, int32 (B, h, w), and where things are, bool (B, h, w)."""
        thing, is_there = nearest(semantics[..., THING], self._count)
        kind, _ = nearest(semantics[..., SIDE], len(self._sides))
        side = mx.array(self._sides)[kind]
        columns, rows = _positions(*semantics.shape[1:3])
        column = mx.clip(columns - nearest(semantics[..., COLUMN])[0], 0, side - 1)
        row = mx.clip(rows - nearest(semantics[..., ROW])[0], 0, side - 1)
        first = thing * self._starts[-1] + mx.array(self._starts)[kind]
        return first + row * side + column, is_there

    def __call__(self, semantics: mx.array) -> mx.array:
        rows, is_there = self.rows(semantics)
        # Not trained: latents are differences from it.
        return mx.where(is_there[..., None], self.things(rows), mx.stop_gradient(self.empty))


class Paint(nn.Module):
    """Paints known things and lays them over a background: pictures (B, H, W, 4) -> the same shape.

    A network for each pixel paints: its input is the pixel, with alpha, the thing and the color.
    """

    def __init__(self, config: SemanticConfig):
        super().__init__()
        self._count = config.things
        width, colors = config.paint_width, len(codes(COLOR.stop - COLOR.start))
        self.pixel = nn.Linear(4, width)
        self.thing = nn.Embedding(config.things, width)
        self.color = nn.Embedding(colors, width)
        self.layers = [nn.Linear(width, width) for _ in range(2)]
        self.color_again = nn.Embedding(colors, width)
        self.out = nn.Linear(width, 4)
        # Starts without a change.
        self.out.weight = mx.zeros_like(self.out.weight)
        self.out.bias = mx.zeros_like(self.out.bias)
        self.grounds = -mx.ones((colors, 4))

    def __call__(self, pictures: mx.array, semantics: mx.array) -> mx.array:
        factor = pictures.shape[1] // semantics.shape[1]

        def enlarged(x: mx.array) -> mx.array:
            return mx.repeat(mx.repeat(x, factor, axis=1), factor, axis=2)

        thing, is_thing = nearest(semantics[..., THING], self._count)
        color, is_painted = nearest(semantics[..., COLOR])
        x = self.pixel(pictures) + enlarged(self.thing(thing) + self.color(color))
        x = self.layers[0](nn.leaky_relu(x, 0.1)) + enlarged(self.color_again(color))
        x = nn.leaky_relu(x, 0.1)
        x = x + nn.leaky_relu(self.layers[1](x), 0.1)
        painted = enlarged((is_thing & is_painted)[..., None])
        pictures = pictures + mx.where(painted, self.out(x), 0)

        ground, is_ground = nearest(semantics[..., GROUND])
        below = (self.grounds[ground].astype(pictures.dtype) + 1) * is_ground[..., None]
        visible = 1 - mx.clip((pictures[..., 3:] + 1) / 2, 0, 1)
        return pictures + visible * enlarged(below)
