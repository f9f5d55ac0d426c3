"""Random scenes of GenEval's six categories and three more, with combinations held out for tests.

The categories are those of GenEval (arXiv 2310.11513: single object, two objects, counting, colors,
position, color attribution), and sizes, backgrounds and mixtures. A tenth of the noun pairs and a
tenth of the noun-color pairs never occur in training: a score on them measures composition, not
memorization.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_snapgen.errors import UserError, nearest
from train.data.stickers.captions import RELATIONS, Placed, Scene, caption, pick
from train.data.stickers.vocabulary import NOTO, Collection, Noun

# Glyphs have few sizes and positions, mostly on a grid of the latents' scale, and are in the order
# in which the caption names them. So few layouts match a prompt, and a small model learns the words
# from a tenth of the scenes.
MOST_SIZED = 4  # glyphs of one kind with a size word

_Subjects = list[tuple[Noun, str | None]]
"""The noun and color of each glyph; equal ones stand next to each other."""
HELD_OUT_CATEGORIES = ("two_objects", "position", "colors", "color_attribution")
TRAINING, VALIDATION = 0, 1  # first word of a scene's random seed; geneval.py has 2
ONE_NOUN = 3


def _held_out(*names: str) -> bool:
    digest = hashlib.blake2b("|".join(names).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


@functools.lru_cache(maxsize=200_000)
def is_held_out_pair(a: str, b: str) -> bool:
    """Whether the nouns named `a` and `b`, in either order, are never in one training scene."""
    return a != b and _held_out("pair", *sorted((a, b)))


@functools.lru_cache(maxsize=20_000)
def is_held_out_color(noun: Noun, color: str) -> bool:
    """Whether the noun never has the color `color` in a training scene.

    Its own color is never held out, because training pictures show it without naming it.
    """
    return color != noun.own_color and _held_out("colour", noun.name, color)


@dataclass(frozen=True)
class _Pool:
    """The choices among the first `num_nouns` nouns of a collection."""

    collection: Collection
    nouns: tuple[Noun, ...]
    recolorable: tuple[Noun, ...]
    held_out_pairs: tuple[tuple[Noun, Noun], ...]
    held_out_colors: tuple[tuple[Noun, str], ...]


@functools.lru_cache(maxsize=8)
def _pool(collection: Collection, num_nouns: int | None) -> _Pool:
    nouns = collection.first(num_nouns)
    recolorable = tuple(noun for noun in nouns if noun.recolor)
    pairs = tuple(
        (a, b) for a, b in itertools.combinations(nouns, 2) if is_held_out_pair(a.name, b.name)
    )
    colors = tuple(
        (noun, color)
        for noun in recolorable
        for color in collection.colors
        if is_held_out_color(noun, color)
    )
    return _Pool(collection, nouns, recolorable, pairs, colors)


def _noun_set(rng: np.random.Generator, options: tuple[Noun, ...], count: int) -> list[Noun]:
    """`count` different nouns without a held-out pair among them."""
    while True:
        nouns = [pick(rng, options) for _ in range(count)]
        pairs = itertools.combinations(nouns, 2)
        if all(a is not b and not is_held_out_pair(a.name, b.name) for a, b in pairs):
            return nouns


def _color_of(
    rng: np.random.Generator, noun: Noun, pool: _Pool, *, taken: str | None = None
) -> str:
    """A color for `noun` that is neither held out nor `taken`."""
    while True:
        color = pick(rng, tuple(pool.collection.colors))
        if color != taken and not is_held_out_color(noun, color):
            return color


def _count(rng: np.random.Generator, pool: _Pool) -> int:
    """From two to the collection's largest number."""
    return 2 + int(rng.random() * (pool.collection.most - 1))


def _subjects(rng: np.random.Generator, pool: _Pool, category: str, held_out: bool) -> _Subjects:
    """The noun and color of each glyph, equal ones next to each other."""
    if category == "counting":
        return [(pick(rng, pool.nouns), None)] * _count(rng, pool)
    if category in ("two_objects", "position"):
        if held_out:
            pair = list(pick(rng, pool.held_out_pairs))
            pair = pair if rng.random() < 0.5 else pair[::-1]
        else:
            pair = _noun_set(rng, pool.nouns, 2)
        return [(noun, None) for noun in pair]
    if category == "colors":
        if held_out:
            return [pick(rng, pool.held_out_colors)]
        noun = pick(rng, pool.recolorable)
        return [(noun, _color_of(rng, noun, pool))]
    if category == "color_attribution":
        if held_out:
            first = pick(rng, pool.held_out_colors)
            second = pick(rng, [noun for noun in pool.recolorable if noun is not first[0]])
            pair = [first, (second, _color_of(rng, second, pool, taken=first[1]))]
            return pair if rng.random() < 0.5 else pair[::-1]
        a, b = _noun_set(rng, pool.recolorable, 2)
        color = _color_of(rng, a, pool)
        return [(a, color), (b, _color_of(rng, b, pool, taken=color))]
    if category == "mixed":
        return _mixed_subjects(rng, pool)
    if category == "size" and (kind := rng.random()) < 0.35:
        return [(noun, None) for noun in _noun_set(rng, pool.nouns, 2)]
    noun = pick(rng, pool.nouns)
    if category == "size" and kind > 0.85 and pool.collection.sized_groups:
        return [(noun, None)] * min(_count(rng, pool), MOST_SIZED)
    can_color = category in ("size", "background") and noun.recolor
    return [(noun, _color_of(rng, noun, pool) if can_color and rng.random() < 0.4 else None)]


def _mixed_subjects(rng: np.random.Generator, pool: _Pool) -> _Subjects:
    """Colored counts, counts of two nouns, three or four nouns, two with one or both in a color."""
    kind = rng.random()
    if kind < 0.3:
        noun = pick(rng, pool.recolorable)
        return [(noun, _color_of(rng, noun, pool))] * _count(rng, pool)
    if kind < 0.55:
        a, b = _noun_set(rng, pool.nouns, 2)
        count_a, count_b = pick(rng, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)))
        return [(a, None)] * count_a + [(b, None)] * count_b
    if kind < 0.8:
        count = 3 if rng.random() < 0.7 else 4
        return [(noun, None) for noun in _noun_set(rng, pool.nouns, count)]
    a, b = _noun_set(rng, pool.recolorable, 2)
    color = _color_of(rng, a, pool)
    alike = rng.random() < 0.3 and not is_held_out_color(b, color)
    pair = [(a, color), (b, color if alike else None)]
    return pair if rng.random() < 0.5 else pair[::-1]


def _size_words(
    rng: np.random.Generator, collection: Collection, category: str, subjects: _Subjects
) -> list[str | None]:
    """The size word of each glyph."""
    count = len(subjects)
    if category != "size":
        return [None] * count
    if count == 1:
        return [pick(rng, tuple(filter(None, collection.alone)))]
    if len(set(subjects)) == 1:
        return [pick(rng, ("small", "big"))] * count
    pair: list[str | None] = ["big", "small"]
    if "huge" in collection.shared:
        pair = list(pick(rng, (pair, pair, ["huge", "small"], ["big", None], ["small", None])))
    return pair if rng.random() < 0.5 else pair[::-1]


def _cells(
    size: tuple[int, int], count: int, relation: str | None, *, unit: int
) -> tuple[list[tuple[float, float]], int]:
    """Centers (x, y) of `count` squares that do not overlap, and their side in pixels.

    They are as large as possible and in reading order, which is the caption's, except for some
    relations; a shorter row is the top one. The side is a multiple of `unit`, except that of a
    single square.
    """
    height, width = size
    shapes = [(-(-count // columns), columns) for columns in range(1, count + 1)]
    if count == 2:
        shapes = [(2, 1) if relation in ("above", "below") else (1, 2)]
    rows, columns = max(shapes, key=lambda s: (min(height // s[0], width // s[1]), s[1]))
    side = min(height // rows, width // columns)
    side = side if count == 1 else side // unit * unit
    lengths = [columns] * rows
    if count % columns:
        lengths[0] = count - (rows - 1) * columns
    centers = [
        (width / 2 + (x - (length - 1) / 2) * side, height / 2 + (y - (rows - 1) / 2) * side)
        for y, length in enumerate(lengths)
        for x in range(length)
    ]
    return centers[::-1] if relation in ("right", "below") else centers, side


def _layout(
    collection: Collection,
    size: tuple[int, int],
    *,
    words: list[str | None],
    relation: str | None,
) -> list[tuple[int, int, int]]:
    """(side, x, y) of each glyph's square; they do not overlap and lie inside the picture."""
    unit = collection.cell_unit
    centers, cell = _cells(size, len(words), relation, unit=unit)
    shares = collection.alone if len(words) == 1 else collection.shared
    largest = max(shares[word] for word in words)
    if largest > 1:
        cell = min(cell, int(0.97 * min(size) / largest) // unit * unit)
    sides = [2 * round(shares[word] * cell / 2) for word in words]
    if collection.sides:
        sides = [max(side for side in collection.sides if side <= most) for most in sides]
    if max(sides) > cell:
        # One of a pair is larger than its cell: the same gap beside and between both.
        gap = (2 * cell - sum(sides)) / 3
        left = (size[1] - 2 * cell) / 2
        starts = (left + gap, left + 2 * gap + sides[0])
        centers = [(x + side / 2, size[0] / 2) for x, side in zip(starts, sides, strict=True)]
    if collection.sides:
        centers = [
            ((x + unit / 2) // unit * unit, (y + unit / 2) // unit * unit) for x, y in centers
        ]
    return [
        (side, int(x - side / 2), int(y - side / 2))
        for (x, y), side in zip(centers, sides, strict=True)
    ]


def _background(
    rng: np.random.Generator, collection: Collection, category: str, subjects: _Subjects
) -> tuple[str, bool]:
    """A background that contrasts with every glyph, and whether the caption names it."""
    lost = {
        name
        for noun, color in subjects
        for name in (noun.lost_on if color is None else collection.color_lost_on[color])
    }
    options = [name for name in collection.backgrounds if name not in lost]
    named = category == "background" or rng.random() < collection.background_named
    plain = collection.plain
    if not named and (collection.has_alpha or (plain in options and rng.random() < 0.8)):
        return plain, False
    return pick(rng, options), named


def sample_scene(
    rng: np.random.Generator,
    num_nouns: int | None = None,
    held_out: bool = False,
    category: str | None = None,
    *,
    collection: Collection = NOTO,
    size: tuple[int, int] | None = None,
) -> Scene:
    """A random scene with its caption.

    Args:
        rng: the only source of randomness.
        num_nouns: number of nouns to use, from the first; None for all.
        held_out: use a held-out pair of nouns or a held-out color of a noun. Otherwise none.
        category: of the collection; None draws one. Of HELD_OUT_CATEGORIES if `held_out`.
        size: (height, width) in pixels; None: the collection's square.

    Raises:
        UserError: num_nouns out of range, or no such category.
    """
    pool = _pool(collection, num_nouns)
    names = HELD_OUT_CATEGORIES if held_out else tuple(collection.categories)
    if category is not None:
        chosen = category
    elif held_out:
        chosen = pick(rng, names)
    else:
        edges = np.cumsum(list(collection.categories.values()))[:-1]
        chosen = names[int(np.searchsorted(edges, rng.random(), side="right"))]
    if chosen not in names:
        raise UserError(f"unknown category '{chosen}'{nearest(chosen, names)}")
    subjects = _subjects(rng, pool, chosen, held_out)
    return _composed(rng, chosen, subjects, collection=collection, size=size)


def _composed(
    rng: np.random.Generator,
    category: str,
    subjects: _Subjects,
    *,
    collection: Collection,
    size: tuple[int, int] | None = None,
) -> Scene:
    """A scene of the glyphs, with random sizes, positions, background and caption."""
    size = size or collection.size
    words = _size_words(rng, collection, category, subjects)
    relation = None
    if category == "position" or (
        category == "mixed" and len(subjects) == 2 and subjects[0] != subjects[1]
    ):
        relation = pick(rng, tuple(RELATIONS))
    squares = _layout(collection, size, words=words, relation=relation)
    background, named = _background(rng, collection, category, subjects)
    placed = tuple(
        Placed(noun, color, *square, word)
        for (noun, color), square, word in zip(subjects, squares, words, strict=True)
    )
    scene = Scene(category, placed, background, "", relation, named, collection, size)
    return replace(scene, caption=caption(scene, rng))


def training_scene(
    seed: int,
    k: int,
    num_nouns: int | None = None,
    categories: Sequence[str] | None = None,
    *,
    collection: Collection = NOTO,
    size: tuple[int, int] | None = None,
) -> Scene:
    """Scene number k of a seed; both are non-negative.

    Args:
        seed, k: identify the scene.
        num_nouns, size: as for sample_scene.
        categories: use only these, with the collection's relative frequencies.

    Raises:
        UserError: as sample_scene.
    """
    rng = np.random.default_rng((TRAINING, seed, k))
    if not categories:
        return sample_scene(rng, num_nouns, collection=collection, size=size)
    known = collection.categories
    if unknown := [name for name in categories if name not in known]:
        raise UserError(f"unknown category '{unknown[0]}'{nearest(unknown[0], known)}")
    edges = np.cumsum([known[name] for name in categories])
    chosen = categories[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
    return sample_scene(rng, num_nouns, category=chosen, collection=collection, size=size)


def find_noun(name: str, collection: Collection = NOTO) -> Noun:
    """The collection's noun of this name.

    Raises:
        UserError: no such noun.
    """
    nouns = {noun.name: noun for noun in collection.nouns}
    if name not in nouns:
        raise UserError(f"unknown noun '{name}'{nearest(name, nouns)}")
    return nouns[name]


def noun_scene(name: str, seed: int, k: int, *, collection: Collection = NOTO) -> Scene:
    """Scene number k of a seed that shows one noun alone, in its own colors.

    Raises:
        UserError: no such noun.
    """
    noun = find_noun(name, collection)
    rng = np.random.default_rng((ONE_NOUN, seed, k))
    category = pick(rng, ("single_object", "single_object", "single_object", "background", "size"))
    return _composed(rng, category, [(noun, None)], collection=collection)


def validation_scene(
    k: int,
    num_nouns: int | None = None,
    *,
    collection: Collection = NOTO,
    size: tuple[int, int] | None = None,
) -> Scene:
    """Scene number k of a fixed list; every fourth uses a held-out combination."""
    rng = np.random.default_rng((VALIDATION, 0, k))
    return sample_scene(rng, num_nouns, held_out=k % 4 == 3, collection=collection, size=size)
