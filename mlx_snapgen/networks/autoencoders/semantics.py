"""Parts of the convolutional autoencoder for semantic latents, see `mlx_snapgen.semantics`.

The decoder looks up how a known thing looks at a place, draws it in its own colors on transparent
ground, paints it pixel by pixel, and lays it over the background. Everything else is in the latents
of appearance.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.autoencoders.blocks import ResidualBlock
from mlx_snapgen.semantics import (
    CODE_CHANNELS,
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
    Which,
    codes,
    some_codes,
)

_PLACE_ERROR, _SIZE_ERROR = 0.2, 0.25
"""Usual errors of what an encoder says about the place and size, in the units of `PLACE`."""
_FIT, _MISS = 6.0, -3.0
"""Of a place in a square: what it adds if it says just that, and the least, as with no thing there.
Measured: .001 of the edges in 128 scenes are wrong then, .14 and more without the others' votes."""


def nearest(numbers: mx.array, which: Which = None) -> tuple[mx.array, mx.array]:
    """The codes nearest to numbers (..., C), with 8 or 4 channels.

    Args:
        which: the codes to choose from: their numbers, or so many, the first ones; None: all.

    Returns:
        Indices into these codes, int32 (...), and whether the code is there, bool (...): within 60
        degrees or so.
    """
    known = mx.array(some_codes(numbers.shape[-1], which))
    found = numbers.astype(mx.float32) @ known.T
    return mx.argmax(found, axis=-1).astype(mx.int32), mx.max(found, axis=-1) > known.shape[-1] / 2


def _known_codes(numbers: mx.array, which: Which = None) -> mx.array:
    """Numbers (..., C) -> the nearest code, or 0."""
    index, is_there = nearest(numbers, which)
    known = mx.array(some_codes(numbers.shape[-1], which))
    return mx.where(is_there[..., None], known[index], 0)


def _positions(height: int, width: int) -> tuple[mx.array, mx.array]:
    """Columns (1, w) and rows (h, 1) of the latents."""
    return mx.arange(width)[None], mx.arange(height)[:, None]


class Square(NamedTuple):
    """Squares of things: the numbers of their sides in `SemanticConfig.sides`, and their left and
    top edges in latents."""

    side: mx.array
    left: mx.array
    top: mx.array

    @property
    def edges(self) -> tuple[mx.array, mx.array]:
        """Left and top, as the codes of `COLUMN` and `ROW`."""
        return self.left, self.top


class Inside(NamedTuple):
    """Of pairs of a place and a square."""

    right: mx.array
    down: mx.array
    is_in: mx.array


def _squares(place: mx.array, config: SemanticConfig) -> Square:
    """The squares that numbers of `PLACE` (B, h, w, 3) name."""
    number = mx.argmin(mx.abs(place[..., 2:] - mx.log2(mx.array(config.sides) / MIDDLE)), axis=-1)
    side = mx.array(config.sides)[number]
    edges = []
    for i, here in enumerate(_positions(*place.shape[1:3])):
        inside = mx.clip(mx.floor((place[..., i] / EDGE + 1) * 0.5 * side), 0, side - 1)
        edges.append(here - inside.astype(mx.int32))
    return Square(number, *edges)


def _has_codes(edges: Sequence[mx.array]) -> mx.array:
    """Whether left and top edges have codes: squares begin in the picture, near its corner."""
    count = len(codes(COLUMN.stop - COLUMN.start))
    return functools.reduce(mx.logical_and, ((x >= 0) & (x < count) for x in edges))


def as_codes(seen: mx.array, config: SemanticConfig) -> mx.array:
    """What an encoder sees (B, h, w, `SEEN_CHANNELS`) -> semantic latents (B, h, w, S).

    Nothing is known about things whose edges have no code, more than 24 latents from the corner or
    outside of the picture.
    """
    found = _squares(seen[..., PLACE].astype(mx.float32), config)
    places = codes(CODE_CHANNELS)
    edges = [mx.array(places)[mx.clip(edge, 0, len(places) - 1)] for edge in found.edges]
    is_near = _has_codes(found.edges)
    is_thing = nearest(seen[..., THING], config.known)[1]
    of_thing = [
        _known_codes(seen[..., THING], config.known),
        _known_codes(seen[..., COLOR]),
        *edges,
        mx.array(places)[found.side],
    ]
    thing, color, *square = (mx.where((is_thing & is_near)[..., None], x, 0) for x in of_thing)
    ground = _known_codes(seen[..., GROUND])
    ground = mx.where((is_thing & ~is_near)[..., None], 0, ground)
    return mx.concatenate([thing, color, ground, *square], axis=-1).astype(seen.dtype)


def _inside(square: Square, sides: tuple[int, ...], shape: Sequence[int]) -> Inside:
    """How far right and down places (P,) lie in squares (B, Q), and whether: (B, P, Q)."""
    side = mx.array(sides)[square.side][:, None]
    columns, rows = (mx.broadcast_to(x, shape).reshape(-1, 1) for x in _positions(*shape))
    right, down = columns - square.left[:, None], rows - square.top[:, None]
    is_in = (right >= 0) & (right < side) & (down >= 0) & (down < side)
    return Inside(right, down, is_in)


def _settled(
    numbers: mx.array, square: Square, is_thing: mx.array, config: SemanticConfig
) -> tuple[mx.array, mx.array]:
    """Votes counted: a square that most of its places name is a thing, with their mean codes.

    Args:
        numbers: of `THING` and `COLOR`, (B, h, w, 12).
        square: that each place names, (B, h w) each.
        is_thing: whether the place may vote, (B, h w).

    Returns:
        Semantic latents (B, h, w, S), but for the background, and where such a thing is.
    """
    shape, places = numbers.shape[1:3], mx.array(codes(CODE_CHANNELS))
    is_in = _inside(square, config.sides, shape).is_in & is_thing[:, None]
    same = functools.reduce(mx.logical_and, (x[..., None] == x[:, None] for x in square))
    area = mx.array(config.sides)[square.side] ** 2
    share = (same & is_in & is_thing[..., None]).sum(axis=1) / area
    share = mx.where(_has_codes(square.edges), share, 0)
    shares = mx.where(is_in, share[:, None], 0)
    chosen = mx.argmax(shares, axis=-1)
    is_agreed = mx.max(shares, axis=-1) > 0.5

    means = mx.swapaxes(is_in, 1, 2) @ numbers.flatten(1, 2) / area[..., None]
    thing, color = (
        _known_codes(means[..., part], n) for part, n in ((THING, config.known), (COLOR, None))
    )
    side, left, top = (places[mx.clip(x, 0, len(places) - 1)] for x in square)
    ground = mx.zeros_like(side)
    found = mx.concatenate([thing, color, ground, left, top, side], axis=-1)
    found = mx.take_along_axis(found, chosen[..., None], axis=1)
    found = mx.where(is_agreed[..., None], found, 0)
    return found.reshape(*numbers.shape[:3], -1), is_agreed.reshape(numbers.shape[:3])


def _coded_part(x: mx.array, config: SemanticConfig) -> mx.array:
    """The part of maps (B, h, w, C) in which squares have codes; pairs of all places are many."""
    most = len(codes(COLUMN.stop - COLUMN.start)) + config.sides[-1]
    return x[:, :most, :most]


def _whole(part: mx.array, maps: mx.array) -> mx.array:
    """A part at the top left (B, ...), and zeros up to the height and width of `maps`."""
    missing = [(0, maps.shape[axis] - part.shape[axis]) for axis in (1, 2)]
    return mx.pad(part, [(0, 0), *missing, *[(0, 0)] * (part.ndim - 3)])


def _with_ground(semantics: mx.array, ground: mx.array) -> mx.array:
    """Codes of the part that has them, and of the background everywhere."""
    known = _whole(semantics, ground)
    parts = [known[..., : GROUND.start], ground, known[..., GROUND.stop :]]
    return mx.concatenate(parts, axis=-1)


def agreed(seen: mx.array, config: SemanticConfig) -> mx.array:
    """As `as_codes`, of what an encoder sees, but all places of a thing agree.

    Each place names a square, and votes for that named one about it which fits best to what all
    places of the square say. Where there seems to be a thing, but most places of no square agree,
    nothing is known.
    """
    found = _coded_part(seen.astype(mx.float32), config)
    is_thing = nearest(found[..., THING], config.known)[1].flatten(1)
    named = _squares(found[..., PLACE], config)
    named = Square(*(x.flatten(1) for x in named))
    side = mx.array(config.sides)[named.side][:, None]
    inside = _inside(named, config.sides, found.shape[1:3])
    x, y, size = mx.split(found[..., PLACE].flatten(1, 2), 3, axis=-1)
    right, down = (EDGE * ((2 * x + 1) / side - 1) for x in (inside.right, inside.down))
    misfit = ((x - right) ** 2 + (y - down) ** 2) / _PLACE_ERROR**2
    misfit += (size - mx.log2(side / MIDDLE)) ** 2 / _SIZE_ERROR**2
    more = mx.maximum(_FIT - misfit, _MISS) - _MISS
    fit = (more * (inside.is_in & is_thing[..., None])).sum(axis=1, keepdims=True) + _MISS * side**2
    vote = mx.argmax(mx.where(inside.is_in & is_thing[:, None], fit, -mx.inf), axis=-1)
    square = Square(*(mx.take_along_axis(x, vote, axis=1) for x in named))
    semantics, is_agreed = _settled(found[..., : COLOR.stop], square, is_thing, config)
    unknown = nearest(seen[..., THING], config.known)[1] & ~_whole(is_agreed, seen)
    ground = mx.where(unknown[..., None], 0, _known_codes(seen[..., GROUND].astype(mx.float32)))
    return _with_ground(semantics, ground).astype(seen.dtype)


def mended(semantics: mx.array, config: SemanticConfig) -> mx.array:
    """Semantic latents (B, h, w, S) -> the codes nearest to them, where a thing's places agree.

    Each place votes for the square that its codes name. Parts of things that are in no square which
    most of its places name are left out, down to the background.
    """
    ground = _known_codes(semantics[..., GROUND].astype(mx.float32))
    found = _coded_part(semantics.astype(mx.float32), config)
    is_thing = nearest(found[..., THING], config.known)[1].flatten(1)
    counts = len(config.sides), None, None
    square = Square(
        *(
            nearest(found[..., part], count)[0].flatten(1)
            for part, count in zip((SIDE, COLUMN, ROW), counts, strict=True)
        )
    )
    known, _ = _settled(found[..., : COLOR.stop], square, is_thing, config)
    return _with_ground(known, ground).astype(semantics.dtype)


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
        self._known, self._sides = config.known, config.sides
        self._starts = np.cumsum([0, *(side**2 for side in config.sides)]).tolist()
        self.things = nn.Embedding(len(config.known) * config.places, config.appearance_channels)
        self.empty = mx.zeros(config.appearance_channels)

    def own(self, config: SemanticConfig) -> mx.array:
        """The rows of `SemanticConfig.own`."""
        return self.things.weight[config.things * config.places :]

    def set_own(self, config: SemanticConfig, rows: mx.array) -> None:
        """Replace the rows of `SemanticConfig.own`."""
        known = self.things.weight[: config.things * config.places]
        self.things.weight = mx.concatenate([known, rows.astype(known.dtype)])
        self._known = config.known

    def rows(self, semantics: mx.array) -> tuple[mx.array, mx.array]:
        """Rows of the table, int32 (B, h, w), and where things are, bool (B, h, w)."""
        thing, is_there = nearest(semantics[..., THING], self._known)
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
        self._known = config.known
        width, colors = config.paint_width, len(codes(CODE_CHANNELS))
        self.pixel = nn.Linear(4, width)
        self.thing = nn.Embedding(len(config.known), width)
        self.color = nn.Embedding(colors, width)
        self.layers = [nn.Linear(width, width) for _ in range(2)]
        self.color_again = nn.Embedding(colors, width)
        self.out = nn.Linear(width, 4)
        # Starts without a change.
        self.out.weight = mx.zeros_like(self.out.weight)
        self.out.bias = mx.zeros_like(self.out.bias)
        self.grounds = -mx.ones((colors, 4))

    def set_own(self, config: SemanticConfig) -> None:
        """Paint the things of `SemanticConfig.own` as the mean of the others."""
        known = self.thing.weight[: config.things]
        mean = mx.repeat(known.mean(axis=0, keepdims=True), len(config.own), axis=0)
        self.thing.weight = mx.concatenate([known, mean])
        self._known = config.known

    def __call__(self, pictures: mx.array, semantics: mx.array) -> mx.array:
        factor = pictures.shape[1] // semantics.shape[1]

        def enlarged(x: mx.array) -> mx.array:
            return mx.repeat(mx.repeat(x, factor, axis=1), factor, axis=2)

        thing, is_thing = nearest(semantics[..., THING], self._known)
        color, is_painted = nearest(semantics[..., COLOR])
        x = self.pixel(pictures) + enlarged(self.thing(thing) + self.color(color))
        x = self.layers[0](nn.leaky_relu(x, 0.1)) + enlarged(self.color_again(color))
        x = nn.leaky_relu(x, 0.1)
        x = x + nn.leaky_relu(self.layers[1](x), 0.1)
        painted = enlarged((is_thing & is_painted)[..., None])
        pictures = pictures + mx.where(painted, self.out(x), 0)

        ground, is_ground = nearest(semantics[..., GROUND])
        # Nothing of a thing's edges, nor of a decoder's noise, is beside things.
        pictures = mx.where(enlarged((is_ground & ~is_thing)[..., None]), -1, pictures)
        below = (self.grounds[ground].astype(pictures.dtype) + 1) * is_ground[..., None]
        # Less than nothing would be seen on a background; it is still trained.
        missing = mx.stop_gradient(mx.maximum(-1 - pictures, 0))
        pictures = pictures + missing * enlarged(is_ground[..., None])
        visible = 1 - mx.clip((pictures[..., 3:] + 1) / 2, 0, 1)
        return pictures + visible * enlarged(below)
