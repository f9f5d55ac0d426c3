"""The start of semantic latents: how known things look, as an encoder sees them."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.semantics import as_codes
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.semantics import COLUMN, SEEN_CHANNELS, SemanticConfig, codes
from train.data.source import Source
from train.data.stickers.captions import Placed, Scene
from train.data.stickers.semantics import check_semantics, semantic_map
from train.data.stickers.source import Stickers, draw_scenes

BATCH = 8
"""Scenes that are encoded at a time."""


def semantic_source(source: Source) -> Stickers:
    """The scenes to learn semantic latents from; `UserError` for other pictures."""
    parts = source.sources
    if not all(isinstance(part, Stickers) for part in parts):
        raise UserError("--semantic-latents needs --data stickers alone")
    found = max(parts, key=lambda part: part.num_things)
    if not found.collection.sides:
        raise UserError("--semantic-latents needs Fluent Emoji: --data stickers:pictures=FOLDER")
    check_semantics(found.num_things)
    return found


def semantics_of(source: Stickers, factor: int) -> SemanticConfig:
    """The sizes of semantic latents for the things of a source.

    Raises:
        UserError: there are no codes for some of the places.
    """
    collection, most = source.collection, len(codes(COLUMN.stop - COLUMN.start))
    if max(map(max, collection.shapes)) > most * factor:
        raise UserError(f"semantic latents have {most} columns: give an autoencoder of --factor 16")
    sides = tuple(side // factor for side in collection.sides)
    return SemanticConfig(source.num_things, sides)


def known_scenes(source: Stickers) -> Iterator[Scene]:
    """Each thing in each size once, side by side on the plain background."""
    collection = source.collection
    height, width = collection.size
    nouns = collection.first(source.num_nouns)
    for side in collection.sides:
        places = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        places = [(x, y) for x, y in places if max(x + side - width, y + side - height) <= 0]
        for first in range(0, len(nouns), len(places)):
            some = zip(nouns[first : first + len(places)], places, strict=False)
            placed = tuple(Placed(noun, None, side, x, y) for noun, (x, y) in some)
            yield Scene(
                "mixed", placed, collection.plain, "", collection=collection, size=collection.size
            )


def start_known_things(model: Autoencoder, source: Stickers) -> None:
    """Set the table of an autoencoder's decoder to the latents of its encoder, and the backgrounds.

    Args:
        model: with semantic latents for the things of `source`.
    """
    table, factor, config = model.decoder.table, model.config.downsampling, model.config.semantics
    assert config is not None
    found, scenes = np.array(table.things.weight), list(known_scenes(source))
    empty, count = np.zeros(found.shape[1]), 0
    bar = tqdm(range(0, len(scenes), BATCH), desc="known things", unit="batch", leave=False)
    for first in bar:
        some = scenes[first : first + BATCH]
        latents = model.encoder(from_uint8(draw_scenes(some)[0]))[0][..., :-SEEN_CHANNELS]
        seen = mx.array(np.stack([semantic_map(scene, factor) for scene in some]))
        rows, is_there = map(np.array, table.rows(as_codes(seen, config)))
        latents = np.array(latents)
        found[rows[is_there]] = latents[is_there]
        empty, count = empty + latents[~is_there].sum(0), count + (~is_there).sum()
    table.things.weight = mx.array(found)
    table.empty = mx.array((empty / max(count, 1)).astype(np.float32))
    colors = source.collection.backgrounds.values()
    rgba = [(0,) * 4 if color is None else (*color, 255) for color in colors]
    model.decoder.paint.grounds[: len(rgba)] = mx.array(rgba) / 127.5 - 1
