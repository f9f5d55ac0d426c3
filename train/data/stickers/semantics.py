"""What is where in a scene, as maps with the latents' resolution.

An autoencoder makes its semantic latents of them. As in ReDi (Kouzelis et al. 2025,
arXiv:2504.16064) the transformer then generates what a picture shows together with how it looks.
There the features are those of a large vision model and only help the transformer; here they are
the scene's own, and the decoder uses them too.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.semantics import nearest
from mlx_snapgen.semantics import (
    CODE_CHANNELS,
    COLOR,
    EDGE,
    GROUND,
    MIDDLE,
    PLACE,
    SEEN_CHANNELS,
    THING,
    THING_CHANNELS,
    codes,
)
from train.data.stickers.captions import Scene
from train.data.stickers.vocabulary import Noun


def loss_weights() -> tuple[float, ...]:
    """Of the channels: few things are painted, so that the colors' variance is small."""
    weights = np.ones(SEEN_CHANNELS)
    weights[PLACE], weights[COLOR] = (2, 2, 4), 6
    return tuple(weights.tolist())


def check_semantics(num_nouns: int) -> None:
    """`UserError` if there are more nouns than codes."""
    if num_nouns > (most := len(codes(THING_CHANNELS))):
        raise UserError(
            f"semantic latents tell at most {most} nouns apart, not {num_nouns}: "
            f"--data stickers:nouns={most}"
        )


def things_at(semantics: np.ndarray) -> np.ndarray:
    """Maps (..., S) -> a number for noun and color at each place, or 0; int32."""
    nouns, colors = (_numbers(semantics[..., part]) for part in (THING, COLOR))
    return np.where(nouns > 0, nouns * (1 + len(codes(CODE_CHANNELS))) + colors, 0)


def _numbers(channels: np.ndarray) -> np.ndarray:
    index, is_there = (np.array(x) for x in nearest(mx.array(channels)))
    return np.where(is_there, 1 + index, 0)


def right_share(semantics: np.ndarray, expected: np.ndarray) -> float:
    """Share of the places of things with the right noun and color; see `things_at`."""
    things = things_at(expected)
    return float((things_at(semantics) == things)[things > 0].mean())


def semantic_map(
    scene: Scene, factor: int, *, more: Mapping[Noun, int] | None = None
) -> np.ndarray:
    """What is where in a scene, at the latents' places.

    Args:
        factor: side of the picture, divided by that of its latents.
        more: nouns that are none of the collection's -> numbers of their codes.

    Returns:
        float32 (H / factor, W / factor, `SEEN_CHANNELS`), what an encoder should see. Where a
        thing is none of these, all codes are 0.
    """
    height, width = scene.size
    y = (np.arange(height // factor) + 0.5)[:, None] * factor
    x = (np.arange(width // factor) + 0.5)[None, :] * factor
    found = np.zeros((height // factor, width // factor, SEEN_CHANNELS), np.float32)
    colors = codes(CODE_CHANNELS)
    found[..., GROUND] = colors[list(scene.collection.backgrounds).index(scene.background)]
    for placed in scene.placed:
        center_x, center_y = placed.center
        right, down = np.broadcast_arrays(
            (x - center_x) / (placed.size_px / 2), (y - center_y) / (placed.size_px / 2)
        )
        inside = (np.abs(right) < 1) & (np.abs(down) < 1)
        number = (more or {}).get(placed.noun)
        if number is None and placed.noun not in scene.collection.nouns:
            found[inside, GROUND] = 0
            continue
        if number is None:
            number = scene.collection.nouns.index(placed.noun)
        size = np.full_like(right, np.log2(placed.size_px / factor / MIDDLE))
        found[inside, THING] = codes(THING_CHANNELS)[number]
        found[inside, PLACE] = np.stack([EDGE * right, EDGE * down, size], -1)[inside]
        if placed.color is not None:
            found[inside, COLOR] = colors[list(scene.collection.colors).index(placed.color)]
    return found
