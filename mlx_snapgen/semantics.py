"""Semantic latents: what is where in a picture.

Each place of the latents has a code of the thing there, where in the thing it is, and codes of its
color and of the background. A transformer learns codes far sooner than pictures.
"""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np

from mlx_snapgen.errors import UserError

THING, PLACE, COLOR, GROUND = slice(0, 8), slice(8, 11), slice(11, 15), slice(15, 19)
"""Channels: a code of the thing; how far right of its center, how far below, and its size; a code
of the color that it is painted in; a code of the background, also where a known thing is. 0 means
no known thing, a thing's own color, and that the latents of appearance tell what is there."""
CHANNELS = GROUND.stop
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
        sides: of the things, in latents.
        head_blocks: residual blocks of the encoder for the semantic latents alone.
        appearance_channels: of the encoder and for the decoder's first level. The autoencoder's
            latents have the first of them.
        paint_width: hidden channels of the network that paints things.
    """

    things: int
    sides: tuple[int, ...]
    head_blocks: int = 4
    appearance_channels: int = 32
    paint_width: int = 48

    def __post_init__(self):
        if not 0 < self.things <= len(codes(THING.stop)):
            raise UserError(f"there are codes for 1 to {len(codes(THING.stop))} things")
        if not self.sides or any(side < 1 for side in self.sides):
            raise UserError(f"sides of things are at least 1, not {self.sides}")


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
    if channels == THING.stop:
        halves = itertools.product((0.5, -0.5), repeat=channels)
        found += [np.array(h) for h in halves if sum(value < 0 for value in h) % 2 == 0]
    order = np.random.default_rng(_ORDER_SEED).permutation(len(found))
    return (np.stack(found)[order] * (channels / 2) ** 0.5).astype(np.float32)
