"""Semantic latents: what is where in a picture.

Each place of the latents has codes of the thing there, its color, its square and the background. A
transformer learns codes far sooner than pictures.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from mlx_snapgen.errors import UserError

THING, COLOR, GROUND = slice(0, 8), slice(8, 12), slice(12, 16)
"""Channels: codes of the thing, the color that it is painted in, and the background, also where a
known thing is. 0 means no known thing, a thing's own color, and that the latents of appearance tell
what is there."""
COLUMN, ROW, SIDE = slice(16, 20), slice(20, 24), slice(24, 28)
"""Channels: codes of the left and top edge of the thing's square, and of its size. As all codes,
those of a thing are the same at all its places, and clear though they are noisy."""
CHANNELS = SIDE.stop
THING_CHANNELS, CODE_CHANNELS = 8, 4
"""Of the code of a thing, and of each other code."""
PLACE = slice(16, 19)
"""Instead of these three codes, what the encoder sees: how far right of the thing's center a place
is, how far below, and the size."""
SEEN_CHANNELS = PLACE.stop
EDGE = 1.7
"""The place at the edges of a thing's square: about root mean square 1 within it."""
MIDDLE = 6
"""Side in latents of a thing whose size is 0; it is 1 for one that is twice as large."""
_ORDER_SEED = 8


@dataclass(frozen=True)
class SemanticConfig:
    """Sizes of the parts of an autoencoder for its semantic latents.

    Attributes:
        things: so many are known, by their codes.
        sides: of the things, in latents, ascending.
        head_blocks: residual blocks of the encoder for the semantic latents alone.
        appearance_channels: of the encoder and for the decoder's first level. The autoencoder's
            latents have the first of them.
        paint_width: hidden channels of the network that paints things.
        own: numbers of the codes of more things, which a user added.
    """

    things: int
    sides: tuple[int, ...]
    head_blocks: int = 4
    appearance_channels: int = 32
    paint_width: int = 48
    own: tuple[int, ...] = ()

    def __post_init__(self):
        if not 0 < self.things <= len(codes(THING_CHANNELS)):
            raise UserError(f"there are codes for 1 to {len(codes(THING_CHANNELS))} things")
        if len({*self.own}) < len(self.own) or not {*self.own} <= {*self.free()}:
            raise UserError(
                f"codes of more things are {self.things} to {len(codes(THING_CHANNELS)) - 1}, each "
                f"once: {self.own}"
            )
        most = len(codes(CODE_CHANNELS))
        if not self.sides or list(self.sides) != sorted({*self.sides} & {*range(1, most + 1)}):
            raise UserError(f"sides of things are 1 to {most} latents, ascending: {self.sides}")

    @property
    def known(self) -> tuple[int, ...]:
        """Numbers of the codes of all things, in the order of their rows in tables."""
        return (*range(self.things), *self.own)

    @property
    def places(self) -> int:
        """Rows of a table for one thing: one for each side and place."""
        return sum(side**2 for side in self.sides)

    def free(self) -> range:
        """Numbers of the codes that more things can have."""
        return range(self.things, len(codes(THING_CHANNELS)))


Which = int | Sequence[int] | None
"""Codes to choose from: so many, the first ones, those of these numbers, or all."""


@cache
def codes(channels: int) -> np.ndarray:
    """Codes (240, 8) or (24, 4): the shortest vectors of the lattices E8 and D4, shuffled.

    They are at least 60 degrees apart from each other; no more vectors than these can be in so many
    dimensions. A number of a code has mean square 1.
    """
    found = []
    for pair in itertools.combinations(range(channels), 2):
        for signs in itertools.product((1, -1), repeat=2):
            vector = np.zeros(channels)
            vector[list(pair)] = signs
            found.append(vector)
    if channels == THING_CHANNELS:
        halves = itertools.product((0.5, -0.5), repeat=channels)
        found += [np.array(h) for h in halves if sum(value < 0 for value in h) % 2 == 0]
    order = np.random.default_rng(_ORDER_SEED).permutation(len(found))
    return (np.stack(found)[order] * (channels / 2) ** 0.5).astype(np.float32)


def some_codes(channels: int, which: Which = None) -> np.ndarray:
    """The first codes, those of the numbers `which`, or all."""
    found = codes(channels)
    return found[:which] if which is None or isinstance(which, int) else found[list(which)]
