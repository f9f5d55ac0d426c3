"""The things of the sticker scenes: nouns with their emoji, colors and backgrounds."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.errors import UserError


@dataclass(frozen=True)
class Noun:
    """A thing that one glyph of the font shows.

    Attributes:
        name, plural: everyday English, singular and plural.
        emoji: the character to draw.
        own_color: the dominant saturated color, a name of COLORS, if `recolor` can replace it well;
            else None.
        synonyms: other words a person might use, singular.
        lost_on: names of backgrounds too close to the glyph's own colors.
    """

    name: str
    plural: str
    emoji: str
    own_color: str | None
    synonyms: tuple[str, ...]
    lost_on: tuple[str, ...]

    @property
    def recolor(self) -> bool:
        """Whether the glyph can be given another color."""
        return self.own_color is not None


MIN_NOUNS = 12  # with fewer there may be no held-out pair to test on
UNCHANGED = ("sheep", "fish", "deer", "squid", "shrimp")


def pluralize(phrase: str) -> str:
    """Regular plural of a noun phrase; the head is what precedes " of " or " with ".

    >>> pluralize("slice of pizza"), pluralize("puppy"), pluralize("fox")
    ('slices of pizza', 'puppies', 'foxes')
    """
    for link in (" of ", " with "):
        head, found, rest = phrase.partition(link)
        if found:
            return pluralize(head) + link + rest
    if phrase.endswith(UNCHANGED):
        return phrase
    if phrase.endswith("y") and phrase[-2] not in "aeiou":
        return phrase[:-1] + "ies"
    if phrase.endswith("leaf"):
        return phrase[:-1] + "ves"
    return phrase + ("es" if phrase.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",") if word.strip())


def _noun(row: dict[str, str]) -> Noun:
    return Noun(
        row["name"],
        row["plural"] or pluralize(row["name"]),
        row["emoji"],
        row["color"] or None,
        _split(row["synonyms"]),
        _split(row["lost on"]),
    )


def _read_nouns() -> Iterator[Noun]:
    """The nouns of vocabulary.tsv; an empty plural is the regular one.

    The order matters: a small model learns the first N, which are the simplest and most distinct.
    """
    path = Path(__file__).with_suffix(".tsv")
    with open(path, encoding="utf-8", newline="") as file:
        yield from map(_noun, csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


NOUNS: tuple[Noun, ...] = tuple(_read_nouns())

# Hue in degrees, saturation and value in [0, 1] of a recolored glyph's median pixel.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0, 0.85, 0.88),
    "orange": (27, 0.93, 0.98),
    "yellow": (51, 0.82, 0.99),
    "green": (125, 0.70, 0.66),
    "blue": (217, 0.82, 0.88),
    "purple": (275, 0.66, 0.74),
    "pink": (332, 0.42, 1.00),
    "brown": (22, 0.62, 0.50),
    "black": (230, 0.10, 0.17),
    "white": (220, 0.03, 0.96),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "grey": (150, 150, 150),
    "red": (222, 52, 46),
    "yellow": (255, 222, 70),
    "green": (72, 174, 80),
    "blue": (44, 96, 214),
    "light blue": (172, 216, 250),
    "pink": (255, 178, 208),
    "purple": (130, 70, 190),
}

# Backgrounds on which a recolored glyph would not stand out, its own name included.
COLOR_LOST_ON: dict[str, tuple[str, ...]] = {
    "red": ("red",),
    "orange": ("red", "yellow"),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue", "purple"),
    "purple": ("purple", "blue"),
    "pink": ("pink",),
    "brown": ("red", "black"),
    "black": ("black",),
    "white": ("white", "light blue"),
}


def first_nouns(num_nouns: int | None) -> tuple[Noun, ...]:
    """The first `num_nouns` of NOUNS (None: all); `UserError` if there are fewer."""
    num_nouns = len(NOUNS) if num_nouns is None else num_nouns
    if not MIN_NOUNS <= num_nouns <= len(NOUNS):
        raise UserError(f"num_nouns is {num_nouns}; it must lie in {MIN_NOUNS} ... {len(NOUNS)}")
    return NOUNS[:num_nouns]


def vocabulary_file(num_nouns: int | None) -> dict[str, list[str]]:
    """The words of a model that was trained on the first `num_nouns` nouns (None: on all)."""
    nouns = first_nouns(num_nouns)
    return {
        "nouns": [n.name for n in nouns],
        "other_words": sorted({w for n in nouns for w in (n.plural, *n.synonyms)}),
        "colours": list(COLORS),
        "recolourable": [n.name for n in nouns if n.recolor],
        "backgrounds": list(BACKGROUNDS),
    }


def known_nouns(components: Components) -> int:
    """The number of NOUNS, from the first, that the model was trained on."""
    names = (components.vocabulary or {}).get("nouns")
    if names is None:
        raise UserError("the model has no vocabulary.json: give --num-nouns")
    if names != [noun.name for noun in NOUNS[: len(names)]]:
        raise UserError("the model was trained on another vocabulary: give --num-nouns")
    return len(names)
