"""The things of the sticker scenes: nouns with their emoji, colors and backgrounds.

There are two collections: NOTO, the glyphs of the font Noto Color Emoji, 128 px on a plain ground,
and FLUENT, the pictures of Fluent Emoji in 3D, in five shapes of about 256 px on transparent
ground.
"""

import csv
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.errors import UserError
from mlx_snapgen.vocabulary import NUMBERS, pluralize


@dataclass(frozen=True)
class Noun:
    """A thing that one glyph of the font shows.

    Attributes:
        name, plural: everyday English, singular and plural.
        emoji: the character to draw.
        own_color: the dominant color, a name of the collection's colors, if `recolor` can replace
            it well; else None.
        synonyms: other words a person might use, singular.
        lost_on: names of backgrounds too close to the glyph's own colors.
        fixed_color: the color of a glyph that is never recolored, where one word says it.
        is_gray: `recolor` replaces the gray parts, not those of the dominant hue.
        hue: of the parts to recolor, in degrees; None: the most frequent one.
    """

    name: str
    plural: str
    emoji: str
    own_color: str | None
    synonyms: tuple[str, ...]
    lost_on: tuple[str, ...]
    fixed_color: str | None = None
    is_gray: bool = False
    hue: float | None = None

    @property
    def recolor(self) -> bool:
        """Whether the glyph can be given another color."""
        return self.own_color is not None


MIN_NOUNS = 12  # with fewer there may be no held-out pair to test on


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
        OWN_COLORS.get(row["name"]),
    )


def _read_nouns() -> Iterator[Noun]:
    """The nouns of vocabulary.tsv; an empty plural is the regular one.

    The order matters: a small model learns the first N, which are the simplest and most distinct.
    """
    path = Path(__file__).with_suffix(".tsv")
    with open(path, encoding="utf-8", newline="") as file:
        yield from map(_noun, csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


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


APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
# Words that captions do not have -> words of captions. Only what means the same is here: the note
# about a prompt names other words.
REPLACED = {
    **{"octopi": "octopuses", "cactuses": "cacti", "fishes": "fish", "mouses": "mice"},
    **{"aeroplane": "airplane", "aircraft": "airplane", "auto": "car", "motorcar": "car"},
    **{"doggy": "dog", "doggie": "dog", "bunny rabbit": "bunny", "piglet": "pig", "piggy": "pig"},
    **{"lady bug": "ladybug", "bumble bee": "bumblebee", "bloom": "blossom", "brolly": "umbrella"},
    **{"tee shirt": "t-shirt", "tshirt": "t-shirt", "tee-shirt": "t-shirt", "gown": "dress"},
    **{"jeans": "pair of jeans", "scissors": "pair of scissors", "trainer": "sneaker"},
    **{"knapsack": "backpack", "schoolbag": "backpack", "school bag": "backpack"},
    **{"cellphone": "phone", "cell phone": "phone", "telly": "tv", "tv set": "tv"},
    **{"pushbike": "bike", "push bike": "bike", "cycle": "bicycle", "sailing boat": "sailboat"},
    **{"space ship": "spaceship", "space rocket": "rocket", "bulb": "light bulb"},
    **{"icecream": "ice cream", "ice-cream": "ice cream", "ice-cream cone": "ice cream cone"},
    **{"cheese": "piece of cheese", "bread": "loaf of bread", "coffee": "cup of coffee"},
    "mug of coffee": "cup of coffee",
    **{"coffee mug": "coffee cup", "cheese burger": "cheeseburger", "snow man": "snowman"},
    **{"birthday present": "present", "gift box": "gift", "jewel": "gem", "gemstone": "gem"},
    **{"jack o'lantern": "jack-o'-lantern", "jack o lantern": "jack-o'-lantern"},
    **{"jack-o-lantern": "jack-o'-lantern", f"jack-o{APOSTROPHE}-lantern": "jack-o'-lantern"},
    **{"violet": "purple", "crimson": "red", "scarlet": "red", "colour": "color"},
    **{"sky blue": "light blue", "sky-blue": "light blue", "light-blue": "light blue"},
    **{"pale blue": "light blue", "backdrop": "background", "1": "one", "pair of": "couple of"},
    **{"beneath": "under", "on top of": "above", "alongside": "beside", "near": "next to"},
    **{"close to": "next to", "adjacent to": "next to", "at the left of": "on the left of"},
    **{"at the right of": "on the right of", "on the left side of": "on the left of"},
    **{"on the right side of": "on the right of"},
    **{"could you": "can you", "would you": "can you", "can you please": "please"},
    **{"could you please": "please", "can you make": "can you draw", "i'd like": "i would like"},
    **{"could you make": "can you draw", "i need": "i want", "give me": "draw me"},
    **{"get me": "draw me", "let's draw": "draw", "let's paint": "draw", "paint": "draw"},
    **{"generate": "create", "it's": "this is", "only": "just", "these": "the", "those": "the"},
    **{"my": "the", "your": "the", "our": "the", "his": "the", "her": "the", "their": "the"},
    **{"pictures of": "picture of", "images of": "image of", "stickers of": "sticker of"},
}
# Left out at the end of a prompt: no caption ends so, and a comma there begins a second thing.
IGNORED = (
    *("please", "thanks", "thank you", "for me", "for us", "as an icon", "as an emoji"),
    *("as a sticker", "as a cartoon", "as a drawing"),
)
# Emoji of no glyph in NOUNS that show the same.
MORE_EMOJI = {
    **{"🐈": "cat", "🐕": "dog", "🐎": "horse", "🐖": "pig", "🐄": "cow", "🐇": "rabbit"},
    **{"🐒": "monkey", "🐁": "mouse", "🐋": "whale", "🏡": "house", "🚘": "car", "📖": "book"},
    **{"🌟": "star", "🛩": "plane", "🌺": "flower", "🍏": "green apple", "💐": "flower"},
    **{"♥": "red heart", "🧡": "orange heart", "💛": "yellow heart", "💚": "green heart"},
    **{"💙": "blue heart", "💜": "purple heart", "🤎": "brown heart", "🖤": "black heart"},
    **{"🤍": "white heart", "🩷": "pink heart", "📗": "green book", "📘": "blue book"},
}
# The colors of glyphs that `recolor` does not change, where one word says it.
OWN_COLORS = {
    **{"banana": "yellow", "tree": "green", "bear": "brown", "monkey": "brown", "owl": "brown"},
    **{"orange": "orange", "pineapple": "yellow", "cookie": "brown", "egg": "white"},
    **{"piece of cheese": "yellow", "light bulb": "yellow", "cloud": "white"},
    **{"snowman": "white", "ghost": "white", "sunflower": "yellow"},
}


NOUNS: tuple[Noun, ...] = tuple(_read_nouns())


@dataclass(frozen=True, eq=False)
class Collection:
    """Things, and how scenes show them.

    Attributes:
        name: of the data in a run's record.
        nouns: the first are the simplest and most distinct; a small model learns the first N.
        colors: name -> hue in degrees, saturation and value of a recolored glyph's median pixel.
        backgrounds: name -> RGB; None is transparent.
        color_lost_on: color -> backgrounds on which it would not stand out.
        plain: the background of most scenes whose caption names none.
        categories: kinds of scenes -> how often each is drawn for training.
        alone: size word (None: without one) -> longer side of a glyph that is alone, as a share of
            the shorter side of the picture.
        shared: the same beside others, as a share of a glyph's cell.
        cell_unit: sides of the cells of several glyphs are multiples of this, in pixels.
        sides: the longer side of a glyph in pixels is the next smaller of these, and its center
            lies at multiples of `cell_unit`; if empty, all sides and places are possible.
        most: the largest number of glyphs of one kind.
        numbers: words of the numbers, from "one".
        shapes: (height, width) of the pictures in pixels -> how often each is drawn.
        has_alpha: pictures are RGBA, premultiplied.
        background_named: share of the scenes of other categories that also name a background.
        sized_groups: a size word may stand with a number.
        pictures: folder of the glyphs' pictures; None: the font.
        replaced: more words that captions do not have -> words of captions.
    """

    name: str
    nouns: tuple[Noun, ...]
    backgrounds: Mapping[str, tuple[int, int, int] | None]
    plain: str
    categories: Mapping[str, float]
    alone: Mapping[str | None, float]
    shared: Mapping[str | None, float]
    shapes: Mapping[tuple[int, int], float]
    colors: Mapping[str, tuple[float, float, float]] = field(default_factory=lambda: COLORS)
    color_lost_on: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: COLOR_LOST_ON)
    cell_unit: int = 8
    sides: tuple[int, ...] = ()
    most: int = 4
    numbers: tuple[str, ...] = NUMBERS
    has_alpha: bool = False
    background_named: float = 0.06
    sized_groups: bool = False
    pictures: Path | None = None
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the most frequent shape, a square."""
        return max(self.shapes, key=lambda shape: self.shapes[shape])

    def first(self, num_nouns: int | None) -> tuple[Noun, ...]:
        """The first `num_nouns` of the nouns (None: all); `UserError` if there are fewer."""
        num_nouns = len(self.nouns) if num_nouns is None else num_nouns
        if not MIN_NOUNS <= num_nouns <= len(self.nouns):
            raise UserError(
                f"num_nouns is {num_nouns}; it must lie in {MIN_NOUNS} ... {len(self.nouns)}"
            )
        return self.nouns[:num_nouns]


NOTO = Collection(
    "stickers",
    NOUNS,
    BACKGROUNDS,
    plain="white",
    categories={
        "single_object": 0.16,
        "two_objects": 0.14,
        "counting": 0.08,
        "colors": 0.12,
        "position": 0.21,
        "color_attribution": 0.18,
        "size": 0.03,
        "background": 0.04,
        "mixed": 0.04,
    },
    alone={None: 80 / 128, "small": 32 / 128, "big": 112 / 128},
    shared={None: 56 / 64, "small": 32 / 64, "big": 56 / 64},
    shapes={(128, 128): 1.0},
)


def _read_fluent() -> tuple[tuple[Noun, ...], dict[str, tuple[int, int, int] | None]]:
    """Nouns and backgrounds of fluent.json."""
    values = json.loads(Path(__file__).with_name("fluent.json").read_text(encoding="utf-8"))
    nouns = []
    for row in values["nouns"]:
        color, how = row.get("color"), row.get("recolor")
        nouns.append(
            Noun(
                row["name"],
                row.get("plural") or pluralize(row["name"]),
                row["emoji"],
                color if how else None,
                tuple(row.get("synonyms", ())),
                tuple(row.get("lost_on", ())),
                fixed_color=None if how else color,
                is_gray=how == "gray",
                hue=row.get("hue"),
            )
        )
    return tuple(nouns), {k: v and tuple(v) for k, v in values["backgrounds"].items()}


FLUENT_NOUNS, FLUENT_BACKGROUNDS = _read_fluent()
FLUENT = Collection(
    "fluent",
    FLUENT_NOUNS,
    FLUENT_BACKGROUNDS,
    plain="transparent",
    categories={
        "single_object": 0.08,
        "two_objects": 0.10,
        "counting": 0.15,
        "colors": 0.08,
        "position": 0.24,
        "color_attribution": 0.15,
        "size": 0.15,
        "background": 0.02,
        "mixed": 0.03,
    },
    alone={None: 160 / 256, "small": 64 / 256, "big": 224 / 256, "huge": 1.0},
    shared={None: 0.834, "small": 0.5, "big": 1.0, "huge": 1.3},
    # The squares of the glyphs are made of whole latents of 16 px.
    cell_unit=16,
    sides=(32, 64, 96, 128, 160, 192, 224, 256),
    shapes={
        (256, 256): 0.48,
        **dict.fromkeys(((192, 320), (320, 192), (256, 384), (384, 256)), 0.13),
    },
    colors=COLORS | {"grey": (230, 0.08, 0.60)},
    color_lost_on=COLOR_LOST_ON | {"orange": ("red", "yellow", "orange"), "grey": ("grey",)},
    most=6,
    numbers=(*NUMBERS, "five", "six"),
    has_alpha=True,
    background_named=0.2,
    sized_groups=True,
    replaced={
        **{"giant": "huge", "gigantic": "huge", "enormous": "huge", "mini": "small"},
        **{"half a dozen": "six", "see-through": "transparent", "clear": "transparent"},
        **{"no background": "transparent background", "no ground": "transparent background"},
        **{"without background": "transparent background"},
        **{"without a background": "transparent background"},
        **{"sunglasses": "pair of sunglasses", "shades": "pair of sunglasses"},
        **{"headphones": "pair of headphones", "cherries": "pair of cherries"},
        **{"grapes": "bunch of grapes", "fries": "box of fries", "french fries": "box of fries"},
        **{"sushi": "piece of sushi", "thumbs-up": "thumbs up"},
    },
)


COLLECTIONS = {collection.name: collection for collection in (NOTO, FLUENT)}
"""By the name of the data in a run's record."""


@functools.cache
def collection_in(pictures: Path | None) -> Collection:
    """FLUENT with the pictures of a folder; NOTO if that is None."""
    return NOTO if pictures is None else replace(FLUENT, pictures=pictures)


def vocabulary_file(num_nouns: int | None, collection: Collection = NOTO) -> dict[str, Any]:
    """The words of a model that was trained on the first `num_nouns` nouns (None: on all)."""
    nouns = collection.first(num_nouns)
    names = [n.name for n in nouns]
    others = {
        word: n.name
        for n in nouns
        for name in (n.name, *n.synonyms)
        for word in (name, n.plural if name == n.name else pluralize(name))
        if word not in names
    }
    emoji = {n.emoji: n.name for n in nouns}
    more = {symbol: name for symbol, name in MORE_EMOJI.items() if symbol not in emoji}
    emoji |= {symbol: name for symbol, name in more.items() if name.split()[-1] in names}
    # Of the words for things, those for the model's things.
    things = {w for n in collection.nouns for w in (n.name, n.plural, *n.synonyms)}
    things -= {*names, *others}
    replaced = {**REPLACED, **collection.replaced}
    return {
        "nouns": names,
        "other_words": dict(sorted(others.items())),
        "colours": list(collection.colors),
        "recolourable": [n.name for n in nouns if n.recolor],
        "own_colours": {n.name: n.fixed_color for n in nouns if n.fixed_color},
        "backgrounds": list(collection.backgrounds),
        "numbers": list(collection.numbers),
        "emoji": emoji,
        "ignored": list(IGNORED),
        "replaced": {word: to for word, to in replaced.items() if not {word, to} & things},
    }


def collection_of(components: Components, pictures: Path | None = None) -> Collection:
    """The collection that a model was trained on; of FLUENT with its folder of `pictures`."""
    if components.config.autoencoder.picture_channels != 4:
        return NOTO
    return replace(FLUENT, pictures=pictures)


def check_drawable(components: Components, pictures: Path | None, option: str) -> None:
    """`UserError` if scenes of the model's collection cannot be drawn without its pictures."""
    if pictures is None and collection_of(components) is not NOTO:
        raise UserError(f"the model learned from pictures of Fluent Emoji: give {option}")


def known_nouns(components: Components, hint: str = "give --num-nouns") -> int:
    """The number of the collection's nouns, from the first, that the model was trained on.

    Raises:
        UserError: that is not known; ends with the hint.
    """
    names = (components.vocabulary or {}).get("nouns")
    if names is None:
        raise UserError(f"the model has no vocabulary.json: {hint}")
    nouns = collection_of(components).nouns
    if names != [noun.name for noun in nouns[: len(names)]]:
        raise UserError(f"the model was trained on another vocabulary: {hint}")
    return len(names)
