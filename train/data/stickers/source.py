"""Sticker scenes as a source of pictures and prompts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.options import integer
from mlx_snapgen.errors import UserError
from train.data.source import SemanticSource, shares_of
from train.data.stickers.captions import Scene
from train.data.stickers.scenes import training_scene, validation_scene
from train.data.stickers.semantics import check_semantics, semantic_map
from train.data.stickers.strangers import strangers, with_strangers
from train.data.stickers.vocabulary import (
    Collection,
    collection_in,
    collection_of,
    known_nouns,
)
from train.data.streams import Stream

PREVIEW_PROMPTS = (
    "an apple",
    "a cat",
    "a red car",
    "three bananas",
    "a dog and a tree",
    "a cat on a blue background",
    "an owl to the left of a house",
    "a green umbrella above a purple fish",
)
"""Prompts of the pictures after every checkpoint of a run."""

NOTICES = {
    "stickers": """\
These weights are under the MIT license of mlx_snapgen. They were trained on pictures drawn with the
Noto Color Emoji font, Copyright 2013 Google LLC, SIL Open Font License 1.1.
""",
    "fluent": """\
These weights are under the MIT license of mlx_snapgen. They were trained on pictures of Fluent
Emoji (https://github.com/microsoft/fluentui-emoji), Copyright (c) Microsoft Corporation, MIT
License.
""",
}
"""Text of LICENSE in models that were trained on a collection."""


def draw_scenes(scenes: Sequence[Scene]) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8 (N, H, W, C), and captions of scenes of one size."""
    from train.data.stickers.render import render  # only what draws stickers needs the font

    return np.stack([render(scene) for scene in scenes]), [scene.caption for scene in scenes]


@dataclass(frozen=True)
class Stickers(SemanticSource):
    """Training scenes.

    All scenes of a batch have one size.

    Attributes:
        seed: scene k is `training_scene(seed, k)`.
        num_nouns: number of nouns to use, from the first; None for all.
        categories: of the collection; None for all.
        pictures: folder of Fluent Emoji's pictures, see `find_pictures`; None for the font.
        strangers: some things are others of the folder, which the captions do not name.
    """

    seed: int = 0
    num_nouns: int | None = None
    categories: tuple[str, ...] | None = None
    pictures: Path | None = None
    strangers: bool = False

    def __post_init__(self):
        self.collection.first(self.num_nouns)

    @property
    def collection(self) -> Collection:
        """The things of the scenes."""
        return collection_in(self.pictures)

    @property
    def channels(self) -> int:
        """Of the pictures."""
        return 4 if self.collection.has_alpha else 3

    @property
    def size_shares(self) -> dict[tuple[int, int], float]:
        """See `Source`."""
        shapes = self.collection.shapes
        return shares_of(shapes, shapes.values()) if len(shapes) > 1 else {}

    def scenes(self, number: int, count: int) -> list[Scene]:
        """The scenes of a batch."""
        start = number * count
        size = _size(self.collection, self.seed, number)
        scenes = [
            training_scene(
                self.seed,
                k,
                self.num_nouns,
                self.categories,
                collection=self.collection,
                size=size,
            )
            for k in range(start, start + count)
        ]
        if not (self.strangers and self.pictures):
            return scenes
        others = strangers(self.pictures, self.num_nouns)
        if not others:
            return scenes
        rng = Stream.STRANGERS.generator(self.seed, number)
        return [with_strangers(scene, others, rng) for scene in scenes]

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        return draw_scenes(self.scenes(number, count))

    @property
    def num_things(self) -> int:
        """See `SemanticSource`."""
        return len(self.collection.first(self.num_nouns))

    def semantics(self, number: int, count: int, *, factor: int) -> np.ndarray:
        """See `SemanticSource`; `UserError` with too many nouns."""
        check_semantics(self.num_things)
        return np.stack([semantic_map(scene, factor) for scene in self.scenes(number, count)])

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        return [scene.caption for scene in self.scenes(number, count)]

    def words(self) -> list[str]:
        """All words of the vocabulary, for `train.tokenizer`."""
        collection = self.collection
        nouns = collection.nouns if self.pictures is None else collection.first(self.num_nouns)
        names = [word for n in nouns for word in (n.name, n.plural, *n.synonyms)]
        return [*names, *collection.colors, *collection.backgrounds]

    def validation(self) -> "ValidationStickers":
        """The fixed validation scenes."""
        return ValidationStickers(self.num_nouns, self.pictures)

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        categories = None if self.categories is None else list(self.categories)
        where = {} if self.pictures is None else {"where": str(self.pictures)}
        name = self.collection.name
        return {"data": name, "num_nouns": self.num_nouns, "categories": categories, **where}


def _size(collection: Collection, seed: int, number: int) -> tuple[int, int]:
    """(height, width) of the pictures of a batch."""
    sizes, shares = list(collection.shapes), list(collection.shapes.values())
    if len(sizes) == 1:
        return sizes[0]
    rng = Stream.STICKER_SIZES.generator(seed, number)
    return sizes[int(rng.choice(len(sizes), p=shares))]


@dataclass(frozen=True)
class ValidationStickers(SemanticSource):
    """The fixed validation scenes, squares.

    Every fourth is a held-out combination.
    """

    num_nouns: int | None = None
    pictures: Path | None = None

    @property
    def channels(self) -> int:
        """Of the pictures."""
        return 4 if collection_in(self.pictures).has_alpha else 3

    def scenes(self, number: int, count: int) -> list[Scene]:
        """The scenes of a batch."""
        collection = collection_in(self.pictures)
        return [
            validation_scene(k, self.num_nouns, collection=collection)
            for k in range(number * count, (number + 1) * count)
        ]

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        return draw_scenes(self.scenes(number, count))

    @property
    def num_things(self) -> int:
        """See `SemanticSource`."""
        return len(collection_in(self.pictures).first(self.num_nouns))

    def semantics(self, number: int, count: int, *, factor: int) -> np.ndarray:
        """See `SemanticSource`."""
        return np.stack([semantic_map(scene, factor) for scene in self.scenes(number, count)])

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        return [scene.caption for scene in self.scenes(number, count)]

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        name = collection_in(self.pictures).name
        return {"data": name, "num_nouns": self.num_nouns, "validation": True}


def known_prompts(components: Components, count: int) -> list[str]:
    """`count` captions in the model's vocabulary; none for a model that has another vocabulary."""
    try:
        num_nouns = known_nouns(components)
    except UserError:
        return []
    collection = collection_of(components)
    return [training_scene(0, k, num_nouns, collection=collection).caption for k in range(count)]


def add_num_nouns(parser: argparse._ActionsContainer, text: str) -> None:
    """`--num-nouns`; `text` is its help."""
    parser.add_argument("--num-nouns", type=integer(-(2**31), 2**31), metavar="N", help=text)
