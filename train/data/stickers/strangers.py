"""Things that no noun names: from them an encoder learns what it does not know."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.stickers.captions import Scene, pick
from train.data.stickers.vocabulary import Noun, collection_in

SHARE = 0.4
"""Of the kinds of things in a scene."""
_SKIN_TONES = {f"{point:x}" for point in range(0x1F3FB, 0x1F400)}


@functools.cache
def strangers(pictures: Path, num_nouns: int | None = None) -> tuple[Noun, ...]:
    """The other things in a folder of Fluent Emoji, each in one skin tone.

    Args:
        num_nouns: so many of the collection's nouns are known.
    """
    known = {_plain(noun.emoji) for noun in collection_in(pictures).first(num_nouns)}
    found = []
    for path in sorted(pictures.glob("*.webp")):
        points = path.stem.split("-")
        try:
            emoji = "".join(chr(int(point, 16)) for point in points)
        except (ValueError, OverflowError):
            continue  # not named after an emoji
        if _plain(emoji) not in known and not _SKIN_TONES & {*points}:
            found.append(Noun(path.stem, path.stem, emoji, None, (), ()))
    return tuple(found)


def _plain(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def with_strangers(scene: Scene, others: Sequence[Noun], rng: np.random.Generator) -> Scene:
    """The scene with some of its kinds of things replaced, in their own colors."""
    kinds = dict.fromkeys(placed.noun for placed in scene.placed)
    swapped = {noun: pick(rng, others) for noun in kinds if rng.random() < SHARE}
    placed = (
        dataclasses.replace(one, noun=swapped[one.noun], color=None) if one.noun in swapped else one
        for one in scene.placed
    )
    return dataclasses.replace(scene, placed=tuple(placed))
