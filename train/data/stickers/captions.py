"""Scenes, and captions of them in varied everyday English."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlx_snapgen.vocabulary import pluralize, with_article
from train.data.stickers.vocabulary import NOTO, Collection, Noun

RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "big": ("big", "big", "large"),
    "huge": ("huge",),
}
# Of collections that have no size "huge".
TWO_SIZES = SIZE_WORDS | {"big": ("big", "big", "large", "huge")}

DETERMINERS = ("a",) * 15 + ("one",) * 2 + ("",) * 2 + ("the",)

# {x} is the whole subject: "a cat", "two red apples", "a cat and a dog".
WRAPPERS = (
    "a picture of {x}",
    "an image of {x}",
    "a sticker of {x}",
    "an emoji of {x}",
    "an icon of {x}",
    "a drawing of {x}",
    "a cartoon of {x}",
    "an illustration of {x}",
    "a simple drawing of {x}",
    "a picture with {x}",
    "a photo of {x}",
    "sticker of {x}",
    "picture of {x}",
    "draw {x}",
    "draw me {x}",
    "please draw {x}",
    "show me {x}",
    "make {x}",
    "create an image of {x}",
    "make a picture of {x}",
    "i want {x}",
    "i would like to see {x}",
    "can you draw {x}",
    "{x}, clip art",
    "{x}, sticker style",
)
SINGULAR_WRAPPERS = ("there is {x}", "this is {x}", "here is {x}")

# {n} is the number as word or digit, {p} the plural, {s} the singular.
COUNTING = (
    "{n} {p}",
    "{n} {p}",
    "{n} {p}",
    "{n} {p} together",
    "exactly {n} {p}",
    "a group of {n} {p}",
    "a set of {n} {p}",
    "{p}, {n} of them",
    "{n} of the same {s}",
    "just {n} {p}",
)
COUNTING_TWO = ("a couple of {p}", "{one} and another {s}")

# {a} and {b} are noun phrases in the order of the picture.
TWO_OBJECTS = (
    "{a} and {b}",
    "{a} and {b}",
    "{a} and {b}",
    "{a} with {b}",
    "{a}, {b}",
    "{a} & {b}",
    "{a} together with {b}",
    "{a} and also {b}",
    "{a} plus {b}",
    "{a} as well as {b}",
)
# Only if both are single objects.
TWO_NEIGHBORS = (
    "both {a} and {b}",
    "{a} next to {b}",
    "{a} beside {b}",
    "{a} and {b} side by side",
    "{a} and {b} next to each other",
)

# {a} is the left one, {b} the right one.
LEFT_RIGHT = (
    "{a} to the left of {b}",
    "{a} left of {b}",
    "{a} on the left of {b}",
    "{b} to the right of {a}",
    "{b} right of {a}",
    "{b} on the right of {a}",
    "{b} with {a} on its left",
    "{a} with {b} on its right",
    "{a} on the left and {b} on the right",
    "{b} on the right and {a} on the left",
    "{a} on the left side, {b} on the right side",
)
LEFT_RIGHT_SENTENCES = (
    "on the left {a}, on the right {b}",
    "on the right {b}, on the left {a}",
    "left: {a}, right: {b}",
    "{a} is to the left of {b}",
    "{b} is to the right of {a}",
    "on the left there is {a} and on the right there is {b}",
)
# {a} is the upper one, {b} the lower one.
ABOVE_BELOW = (
    "{a} above {b}",
    "{a} over {b}",
    "{b} below {a}",
    "{b} under {a}",
    "{b} underneath {a}",
    "{b} with {a} above it",
    "{a} with {b} below it",
    "{a} at the top and {b} at the bottom",
    "{b} at the bottom and {a} at the top",
    "{a} higher up than {b}",
)
ABOVE_BELOW_SENTENCES = (
    "at the top {a}, at the bottom {b}",
    "at the bottom {b}, at the top {a}",
    "top: {a}, bottom: {b}",
    "{a} is above {b}",
    "{b} is below {a}",
    "there is {a} at the top and {b} at the bottom",
)

ON_BACKGROUND = (
    "{x} on {a_c} background",
    "{x} on {a_c} background",
    "{x} with {a_c} background",
    "{x} against {a_c} background",
    "{x} in front of {a_c} background",
    "{x} on {c}",
    "{x}, {c} background",
    "{c} background, {x}",
    "{x} on a plain {c} background",
)


@dataclass(frozen=True)
class Placed:
    """One glyph in a scene.

    Attributes:
        noun: what it shows.
        color: a name of the collection's colors, or None for the glyph's own.
        size_px: the longer side of the glyph and the side of its square cell.
        x, y: left and top edge of the cell. The glyph sits in the middle of it.
        size_word: a key of SIZE_WORDS if the caption has such a word, else None.
    """

    noun: Noun
    color: str | None
    size_px: int
    x: int
    y: int
    size_word: str | None = None

    @property
    def cell(self) -> tuple[int, int, int, int]:
        """The square that no other glyph enters: (x, y, w, h) in pixels."""
        return self.x, self.y, self.size_px, self.size_px

    @property
    def center(self) -> tuple[float, float]:
        """The middle of cell and glyph: (x, y) in pixels."""
        return self.x + self.size_px / 2, self.y + self.size_px / 2


@dataclass(frozen=True)
class Scene:
    """The content of a picture and its caption.

    Attributes:
        category: a key of the collection's categories.
        placed: the glyphs; equal ones stand next to each other. With a relation there are two.
        background: a name of the collection's backgrounds.
        caption: one phrasing out of many.
        relation: of placed[0] to placed[1], a key of RELATIONS, or None if not in the caption.
        background_named: whether the caption names the background.
        collection: of its nouns.
        size: (height, width) in pixels.
    """

    category: str
    placed: tuple[Placed, ...]
    background: str
    caption: str = ""
    relation: str | None = None
    background_named: bool = False
    collection: Collection = NOTO
    size: tuple[int, int] = NOTO.size


def pick(rng: np.random.Generator, options: Sequence):
    """One of `options`, all equally likely; several times faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def _groups(scene: Scene) -> list[tuple[int, Placed]]:
    """(how many, example) for each run of glyphs with the same noun and looks."""
    runs = itertools.groupby(scene.placed, lambda p: (p.noun.name, p.color, p.size_word))
    return [(len(run), run[0]) for run in (list(group) for _, group in runs)]


def _names(noun: Noun, rng: np.random.Generator) -> tuple[str, str]:
    """Singular and plural of a word for the noun, often its name."""
    if noun.synonyms and rng.random() < 0.35:
        synonym = pick(rng, noun.synonyms)
        return synonym, pluralize(synonym)
    return noun.name, noun.plural


def _spelled(color: str, rng: np.random.Generator) -> str:
    """The color; grey is gray half of the time."""
    return "gray" if color == "grey" and rng.random() < 0.5 else color


def _is_colored(item: Placed, rng: np.random.Generator) -> str:
    """ "cat is red"."""
    assert item.color is not None
    return f"{_names(item.noun, rng)[0]} is {_spelled(item.color, rng)}"


def _noun_phrase(
    count: int,
    item: Placed,
    rng: np.random.Generator | None,
    *,
    collection: Collection,
    determiner: str = "a",
) -> str:
    """A noun phrase such as "a red apple" or "two cats"; without `rng` in the plainest wording."""
    noun, color, size = item.noun, item.color, item.size_word
    singular, plural = noun.name, noun.plural
    tail = ""
    if rng is not None:
        singular, plural = _names(noun, rng)
        sizes = SIZE_WORDS if "huge" in collection.alone else TWO_SIZES
        size = size and pick(rng, sizes[size])
        color = color and _spelled(color, rng)
        if color is not None and rng.random() < 0.2:
            form = pick(rng, _COLOR_FORMS)
            if form.startswith("{c}"):
                color = form.format(c=color)
            else:
                color, tail = None, form.format(c=color, be="is" if count == 1 else "are")
    words = " ".join(word for word in (size, color, singular if count == 1 else plural) if word)
    if count > 1:
        digit = rng is not None and rng.random() < 0.35
        return f"{count if digit else collection.numbers[count - 1]} {words}{tail}"
    if determiner == "a":
        return with_article(words) + tail
    return f"{determiner} {words}{tail}".lstrip()


_COLOR_FORMS = (
    "{c}-colored",
    "{c} colored",
    "{c}-coloured",
    " that {be} {c}",
    " in {c}",
    " of {c} color",
    " colored {c}",
)


def _join(phrases: list[str]) -> str:
    if len(phrases) < 3:
        return " and ".join(phrases)
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


def plain_caption(scene: Scene) -> str:
    """The canonical phrasing: "a red apple to the left of a cat on a white background"."""
    phrases = [
        _noun_phrase(count, item, None, collection=scene.collection)
        for count, item in _groups(scene)
    ]
    text = f" {RELATIONS[scene.relation]} ".join(phrases) if scene.relation else _join(phrases)
    if scene.background_named:
        text = f"{text} on {with_article(scene.background)} background"
    return text


def _subject(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """The core of the caption, and whether it is a noun phrase (else it is a sentence)."""
    groups = _groups(scene)
    determiner = pick(rng, DETERMINERS)
    if len(groups) == 1:
        (count, item), style = groups[0], rng.random()
        if count == 1 and style < 0.04:
            determiner = "a single"
        if count == 1 and item.color and not item.size_word and style > 0.95:
            return f"the {_is_colored(item, rng)}", False
        if count > 1 and not (item.color or item.size_word) and style < 0.4:
            number = str(count) if rng.random() < 0.4 else scene.collection.numbers[count - 1]
            forms = COUNTING + COUNTING_TWO if count == 2 else COUNTING
            name, plural = _names(item.noun, rng)
            form = pick(rng, forms).format(n=number, p=plural, s=name, one=with_article(name))
            return form, True
        phrase = _noun_phrase(count, item, rng, collection=scene.collection, determiner=determiner)
        return phrase, True
    phrases = [
        _noun_phrase(count, item, rng, collection=scene.collection, determiner=determiner)
        for count, item in groups
    ]
    if scene.relation:
        if scene.relation in ("right", "below"):
            phrases.reverse()
        horizontal = scene.relation in ("left", "right")
        sentence = rng.random() < 0.25
        if sentence:
            forms = LEFT_RIGHT_SENTENCES if horizontal else ABOVE_BELOW_SENTENCES
        else:
            forms = LEFT_RIGHT if horizontal else ABOVE_BELOW
        return pick(rng, forms).format(a=phrases[0], b=phrases[1]), not sentence
    if len(phrases) == 2:
        forms = TWO_OBJECTS
        if len(scene.placed) == 2:
            forms += TWO_NEIGHBORS
        if all(item.color and not item.size_word for _, item in groups) and rng.random() < 0.07:
            (_, a), (_, b) = groups
            return f"the {_is_colored(a, rng)} and the {_is_colored(b, rng)}", False
        return pick(rng, forms).format(a=phrases[0], b=phrases[1]), True
    return ", ".join(phrases) if rng.random() < 0.15 else _join(phrases), True


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many phrasings of what the scene shows, mostly in lower case."""
    text, is_phrase = _subject(scene, rng)
    if scene.background_named:
        name = _spelled(scene.background, rng)
        form = pick(rng, ON_BACKGROUND) if is_phrase else "{x}, {c} background"
        text = form.format(x=text, c=name, a_c=with_article(name))
        is_phrase = is_phrase and not form.startswith("{c}")
    if is_phrase and rng.random() < 0.45:
        wrappers = WRAPPERS + SINGULAR_WRAPPERS if len(scene.placed) == 1 else WRAPPERS
        text = pick(rng, wrappers).format(x=text)
    if rng.random() < 0.12:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.12 else text
