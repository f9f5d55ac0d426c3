"""Sticker scenes as a source of pictures and prompts, with the options that choose them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.options import integer
from mlx_snapgen.errors import UserError
from train.data.stickers.captions import Scene
from train.data.stickers.scenes import CATEGORIES, SIDE, training_scene, validation_scene
from train.data.stickers.vocabulary import (
    BACKGROUNDS,
    COLORS,
    NOUNS,
    first_nouns,
    known_nouns,
)

SIZE = (SIDE, SIDE)
"""(height, width) of the pictures in pixels."""

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

NOTICE = """\
These weights are under the MIT license of mlx_snapgen. They were trained on pictures drawn with the
Noto Color Emoji font, Copyright 2013 Google LLC, SIL Open Font License 1.1.
"""
"""Text of LICENSE in models that were trained on stickers."""


def draw_scenes(scenes: Sequence[Scene]) -> tuple[np.ndarray, list[str]]:
    """Pictures, uint8 (N, 128, 128, 3), and captions of scenes."""
    from train.data.stickers.render import render  # only what draws stickers needs the font

    return np.stack([render(scene) for scene in scenes]), [scene.caption for scene in scenes]


@dataclass(frozen=True)
class Stickers:
    """Training scenes: a `PictureSource` and a `PromptSource`.

    Attributes:
        seed: scene k is `training_scene(seed, k)`.
        num_nouns: number of nouns to use, from the first; None for all.
        categories: keys of `scenes.CATEGORIES`; None for all.
    """

    seed: int = 0
    num_nouns: int | None = None
    categories: tuple[str, ...] | None = None

    def __post_init__(self):
        first_nouns(self.num_nouns)

    def scenes(self, number: int, count: int) -> list[Scene]:
        """The scenes of a batch."""
        start = number * count
        return [
            training_scene(self.seed, k, self.num_nouns, self.categories)
            for k in range(start, start + count)
        ]

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        return draw_scenes(self.scenes(number, count))

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        return [scene.caption for scene in self.scenes(number, count)]

    def words(self) -> list[str]:
        """All words of the vocabulary, for `train.tokenizer`."""
        names = [word for n in NOUNS for word in (n.name, n.plural, *n.synonyms)]
        return [*names, *COLORS, *BACKGROUNDS]

    def validation(self) -> "ValidationStickers":
        """The fixed validation scenes."""
        return ValidationStickers(self.num_nouns)

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        categories = None if self.categories is None else list(self.categories)
        return {"data": "stickers", "num_nouns": self.num_nouns, "categories": categories}


@dataclass(frozen=True)
class ValidationStickers:
    """The fixed validation scenes, a `PictureSource`; every fourth is a held-out combination."""

    num_nouns: int | None = None

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        start = number * count
        return draw_scenes([validation_scene(start + k, self.num_nouns) for k in range(count)])

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        return {"data": "stickers", "num_nouns": self.num_nouns, "validation": True}


def known_prompts(components: Components, count: int) -> list[str]:
    """`count` captions in the model's vocabulary; none for a model that has another vocabulary."""
    try:
        num_nouns = known_nouns(components)
    except UserError:
        return []
    return Stickers(num_nouns=num_nouns).prompts(0, count)


# --- options ------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--num-nouns` and `--categories`, for `from_options`."""
    add_num_nouns(parser, f"use the first N nouns only (default: all {len(NOUNS)})")
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=list(CATEGORIES),
        metavar="NAME",
        help=f"use only these kinds of scenes: {', '.join(CATEGORIES)} (default: all)",
    )


def add_num_nouns(parser: argparse._ActionsContainer, text: str) -> None:
    """`--num-nouns` alone; `text` is its help."""
    parser.add_argument("--num-nouns", type=integer(-(2**31), 2**31), metavar="N", help=text)


def from_options(args: argparse.Namespace, *, seed: int) -> Stickers:
    """The training scenes that the options of `add_options` choose."""
    return Stickers(seed, args.num_nouns, args.categories and tuple(args.categories))
