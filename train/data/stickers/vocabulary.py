"""The things of the sticker scenes: nouns with their emoji, colors and backgrounds."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
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


APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
# Plurals of captions that nobody should copy.
MISSPELLED = ("tomatos",)
# Words that captions do not have -> words of captions. Only what means the same is here: the note
# about a prompt names other words.
REPLACED = {
    "tomatoes": "tomatos",
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


def vocabulary_file(num_nouns: int | None) -> dict[str, Any]:
    """The words of a model that was trained on the first `num_nouns` nouns (None: on all)."""
    nouns = first_nouns(num_nouns)
    names = [n.name for n in nouns]
    others = {
        word: n.name
        for n in nouns
        for name in (n.name, *n.synonyms)
        for word in (name, n.plural if name == n.name else pluralize(name))
        if word not in names
    }
    emoji = {n.emoji: n.name for n in nouns}
    emoji |= {symbol: name for symbol, name in MORE_EMOJI.items() if name.split()[-1] in names}
    # Of the words for things, those for the model's things.
    things = {w for n in NOUNS for w in (n.name, n.plural, *n.synonyms)} - {*names, *others}
    return {
        "nouns": names,
        "other_words": dict(sorted(others.items())),
        "colours": list(COLORS),
        "recolourable": [n.name for n in nouns if n.recolor],
        "own_colours": {name: color for name, color in OWN_COLORS.items() if name in names},
        "backgrounds": list(BACKGROUNDS),
        "numbers": list(NUMBERS),
        "emoji": emoji,
        "misspelled": [word for word in MISSPELLED if word in others],
        "ignored": list(IGNORED),
        "replaced": {word: to for word, to in REPLACED.items() if not {word, to} & things},
    }


def known_nouns(components: Components) -> int:
    """The number of NOUNS, from the first, that the model was trained on."""
    names = (components.vocabulary or {}).get("nouns")
    if names is None:
        raise UserError("the model has no vocabulary.json: give --num-nouns")
    if names != [noun.name for noun in NOUNS[: len(names)]]:
        raise UserError("the model was trained on another vocabulary: give --num-nouns")
    return len(names)
