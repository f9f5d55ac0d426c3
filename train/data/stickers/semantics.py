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
SEMANTIC_CHANNELS = COLOR.stop
LOSS_WEIGHTS = (1.0,) * COLOR.start + (6.0,) * COLOR_CHANNELS
"""Of the channels: few things are painted, so that the colors' variance is small."""
PLACE_SCALE = 1.7
"""The place at the edge of a thing's square: about root mean square 1 within it."""
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


def semantic_map(scene: Scene, factor: int) -> np.ndarray:
    """Codes, places and colors of the things at the latents' places; 0 where none is.

    Args:
        factor: side of the picture, divided by that of its latents.

    Returns:
        float32 (H / factor, W / factor, SEMANTIC_CHANNELS).
    """
    height, width = scene.size
    y = (np.arange(height // factor) + 0.5)[:, None] * factor
    x = (np.arange(width // factor) + 0.5)[None, :] * factor
    found = np.zeros((height // factor, width // factor, SEMANTIC_CHANNELS), np.float32)
    for placed in scene.placed:
        center_x, center_y = placed.center
        right, down = np.broadcast_arrays(
            (x - center_x) / (placed.size_px / 2), (y - center_y) / (placed.size_px / 2)
        )
        inside = (np.abs(right) < 1) & (np.abs(down) < 1)
        found[inside, :CODE_CHANNELS] = codes()[scene.collection.nouns.index(placed.noun)]
        place = np.stack([right, down], -1)
        found[inside, PLACE] = PLACE_SCALE * place[inside]
        if placed.color is not None:
            color = list(scene.collection.colors).index(placed.color)
            found[inside, COLOR] = codes(COLOR_CHANNELS)[color]
    return found
