"""What is where in a scene, as maps with the latents' resolution.

They are targets of an autoencoder's semantic latents. As in ReDi (Kouzelis et al. 2025,
arXiv:2504.16064) the transformer then generates what a picture shows together with how it looks.
There the features are those of a large vision model and only help the transformer; here they are
the scene's own, and the decoder uses them too.
"""

import itertools
from functools import cache

import numpy as np

from mlx_snapgen.config import PLACE
from mlx_snapgen.errors import UserError
from train.data.stickers.captions import Scene

CODE_CHANNELS, COLOR_CHANNELS = PLACE.start, 4
"""A code for each noun, and one for each color that a noun is painted in; its own color is 0."""
COLOR = slice(PLACE.stop, PLACE.stop + COLOR_CHANNELS)
GROUND = slice(COLOR.stop, COLOR.stop + COLOR_CHANNELS)
"""A code for each background, everywhere in a picture; a transparent one is 0."""
SEMANTIC_CHANNELS = GROUND.stop
LOSS_WEIGHTS = (1.0,) * COLOR.start + (6.0,) * COLOR_CHANNELS
"""Of the channels: few things are painted, so that the colors' variance is small."""
PLACE_SCALE = 1.7
"""The place at the edge of a thing's square: about root mean square 1 within it."""
MIDDLE_SIZE = 96
"""Side in pixels of a thing whose number for the size is 0; it is 1 for twice as large."""
KEY_GAIN = 24.0
"""Factor of `table_keys`."""
_ORDER_SEED = 8


@cache
def codes(channels: int = CODE_CHANNELS) -> np.ndarray:
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
    if channels == CODE_CHANNELS:
        halves = itertools.product((0.5, -0.5), repeat=channels)
        found += [np.array(h) for h in halves if sum(value < 0 for value in h) % 2 == 0]
    order = np.random.default_rng(_ORDER_SEED).permutation(len(found))
    return (np.stack(found)[order] * (channels / 2) ** 0.5).astype(np.float32)


def table_keys() -> tuple[np.ndarray, np.ndarray]:
    """Weight (264, 12) and bias of `SemanticTable.key`, a row for each code.

    The sigmoid of a row is .998 for its own code, and at most .003 for any other.
    """
    kinds = [codes(CODE_CHANNELS), codes(COLOR_CHANNELS)]
    # The product of a code with itself is its number of channels, that with others at most half.
    weights = [KEY_GAIN * c / c.shape[1] for c in kinds]
    weight = np.zeros((sum(map(len, kinds)), CODE_CHANNELS + COLOR_CHANNELS), np.float32)
    weight[: len(kinds[0]), :CODE_CHANNELS], weight[len(kinds[0]) :, CODE_CHANNELS:] = weights
    return weight, np.full(len(weight), -0.75 * KEY_GAIN, np.float32)


def check_semantics(num_nouns: int) -> None:
    """`UserError` if there are more nouns than codes."""
    if num_nouns > len(codes()):
        raise UserError(
            f"semantic latents tell at most {len(codes())} nouns apart, not {num_nouns}: "
            f"--data stickers:nouns={len(codes())}"
        )


def things_at(semantics: np.ndarray) -> np.ndarray:
    """Maps (..., SEMANTIC_CHANNELS) -> a number for noun and color at each place, or 0; int32."""
    nouns = _nearest(semantics[..., :CODE_CHANNELS])
    colors = _nearest(semantics[..., COLOR])
    return np.where(nouns > 0, nouns * (1 + len(codes(COLOR_CHANNELS))) + colors, 0)


def right_share(semantics: np.ndarray, expected: np.ndarray) -> float:
    """Share of the places of things with the right noun and color; see `things_at`."""
    things = things_at(expected)
    return float((things_at(semantics) == things)[things > 0].mean())


def _nearest(numbers: np.ndarray) -> np.ndarray:
    """1 + the number of the nearest code, or 0 where none is within 60 degrees or so."""
    channels = numbers.shape[-1]
    found = numbers @ codes(channels).T
    nearest = 1 + np.argmax(found, axis=-1)
    return np.where(found.max(-1) > channels / 2, nearest, 0).astype(np.int32)



ORDER=dict(THING=slice(0,8),COLUMN=slice(8,12),ROW=slice(12,16),SIDE=slice(16,20),COLOR2=slice(20,24),GROUND2=slice(24,28))
def semantic_map(scene, factor, num_known=None):
    height, width = scene.size
    found = np.zeros((height // factor, width // factor, 28), np.float32)
    D=codes(4);found[...,24:28]=D[list(scene.collection.backgrounds).index(scene.background)]
    for p in scene.placed:
        c,r,m=p.x//factor,p.y//factor,p.size_px//factor
        n=scene.collection.nouns.index(p.noun)
        v=np.zeros(28,np.float32);v[24:28]=found[0,0,24:28]
        if num_known is not None and n>=num_known: v[:]=0
        else:
            v[:8]=codes()[n];v[8:12]=D[c];v[12:16]=D[r];v[16:20]=D[list(scene.collection.sides).index(p.size_px)]
            if p.color is not None: v[20:24]=D[list(scene.collection.colors).index(p.color)]
        found[r:r+m,c:c+m]=v
    return found

def things_at28(x):
    nouns=_nearest(x[...,:8]);cols=_nearest(x[...,20:24]);pl=[_nearest(x[...,a:a+4]) for a in (8,12,16)]
    return nouns,cols,pl
