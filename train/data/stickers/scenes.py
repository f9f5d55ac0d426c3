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
from train.data.stickers.vocabulary import (
    BACKGROUNDS,
    COLOR_LOST_ON,
    COLORS,
    NOUNS,
    Noun,
    first_nouns,
)

SIDE = 128  # pixels of a scene's side; Placed is in these pixels
CELL = SIDE // 2  # side of the square cell of each of two to four glyphs
# Glyphs have four sizes and few positions, all on a grid of the latents' scale, and are in the
# order in which the caption names them. So few layouts match a prompt, and a small model learns the
# words from a tenth of the scenes.
ALONE, SHARING, SMALL, BIG = 80, 56, 32, 112  # pixels of a glyph's longer side

# How often each category is drawn for training.
CATEGORIES = {
    "single_object": 0.16,
    "two_objects": 0.14,
    "counting": 0.08,
    "colors": 0.12,
    "position": 0.21,
    "color_attribution": 0.18,
    "size": 0.03,
    "background": 0.04,
    "mixed": 0.04,
}
_CATEGORY_EDGES = np.cumsum(list(CATEGORIES.values()))[:-1]
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


_OWN_COLORS = {noun.name: noun.own_color for noun in NOUNS}


@functools.lru_cache(maxsize=20_000)
def is_held_out_color(noun: str, color: str) -> bool:
    """Whether the noun named `noun` never has the color `color` in a training scene.

    Its own color is never held out, because training pictures show it without naming it.
    """
    return color != _OWN_COLORS.get(noun) and _held_out("colour", noun, color)


@dataclass(frozen=True)
class _Pool:
    """The choices among the first `num_nouns` nouns."""

    nouns: tuple[Noun, ...]
    recolorable: tuple[Noun, ...]
    held_out_pairs: tuple[tuple[Noun, Noun], ...]
    held_out_colors: tuple[tuple[Noun, str], ...]


@functools.lru_cache(maxsize=8)
def _pool(num_nouns: int | None) -> _Pool:
    nouns = first_nouns(num_nouns)
    recolorable = tuple(noun for noun in nouns if noun.recolor)
    pairs = tuple(
        (a, b) for a, b in itertools.combinations(nouns, 2) if is_held_out_pair(a.name, b.name)
    )
    colors = tuple(
        (noun, color)
        for noun in recolorable
        for color in COLORS
        if is_held_out_color(noun.name, color)
    )
    return _Pool(nouns, recolorable, pairs, colors)


def _noun_set(rng: np.random.Generator, options: tuple[Noun, ...], count: int) -> list[Noun]:
    """`count` different nouns without a held-out pair among them."""
    while True:
        nouns = [pick(rng, options) for _ in range(count)]
        pairs = itertools.combinations(nouns, 2)
        if all(a is not b and not is_held_out_pair(a.name, b.name) for a, b in pairs):
            return nouns


def _color_of(rng: np.random.Generator, noun: Noun, taken: str | None = None) -> str:
    """A color for `noun` that is neither held out nor `taken`."""
    while True:
        color = pick(rng, tuple(COLORS))
        if color != taken and not is_held_out_color(noun.name, color):
            return color


def _subjects(
    rng: np.random.Generator, pool: _Pool, category: str, held_out: bool
) -> list[tuple[Noun, str | None]]:
    """The noun and color of each glyph, equal ones next to each other."""
    if category == "counting":
        return [(pick(rng, pool.nouns), None)] * (2 + int(rng.random() * 3))
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
        return [(noun, _color_of(rng, noun))]
    if category == "color_attribution":
        if held_out:
            first = pick(rng, pool.held_out_colors)
            second = pick(rng, [noun for noun in pool.recolorable if noun is not first[0]])
            pair = [first, (second, _color_of(rng, second, taken=first[1]))]
            return pair if rng.random() < 0.5 else pair[::-1]
        a, b = _noun_set(rng, pool.recolorable, 2)
        color = _color_of(rng, a)
        return [(a, color), (b, _color_of(rng, b, taken=color))]
    if category == "mixed":
        return _mixed_subjects(rng, pool)
    if category == "size" and rng.random() < 0.35:
        return [(noun, None) for noun in _noun_set(rng, pool.nouns, 2)]
    noun = pick(rng, pool.nouns)
    can_color = category in ("size", "background") and noun.recolor
    return [(noun, _color_of(rng, noun) if can_color and rng.random() < 0.4 else None)]


def _mixed_subjects(rng: np.random.Generator, pool: _Pool) -> list[tuple[Noun, str | None]]:
    """Colored counts, counts of two nouns, three or four nouns, two nouns with one colored."""
    kind = rng.random()
    if kind < 0.3:
        noun = pick(rng, pool.recolorable)
        return [(noun, _color_of(rng, noun))] * (2 + int(rng.random() * 3))
    if kind < 0.55:
        a, b = _noun_set(rng, pool.nouns, 2)
        count_a, count_b = pick(rng, ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3)))
        return [(a, None)] * count_a + [(b, None)] * count_b
    if kind < 0.8:
        count = 3 if rng.random() < 0.7 else 4
        return [(noun, None) for noun in _noun_set(rng, pool.nouns, count)]
    a, b = _noun_set(rng, pool.recolorable, 2)
    pair = [(a, _color_of(rng, a)), (b, None)]
    return pair if rng.random() < 0.5 else pair[::-1]


def _sizes(rng: np.random.Generator, category: str, count: int) -> list[tuple[int, str | None]]:
    """Pixels and size word of each glyph."""
    if category == "size" and count == 1:
        return [(SMALL, "small") if rng.random() < 0.5 else (BIG, "big")]
    if category == "size":
        pair: list[tuple[int, str | None]] = [(SHARING, "big"), (SMALL, "small")]
        return pair if rng.random() < 0.5 else pair[::-1]
    return [(ALONE if count == 1 else SHARING, None)] * count


def _cells(rng: np.random.Generator, count: int, relation: str | None) -> list[tuple[int, int]]:
    """Top-left corners (x, y) of `count` squares of side CELL that do not overlap.

    They are in reading order, which is the caption's, except for some relations.
    """
    middle = CELL // 2
    if count == 1:
        return [(middle, middle)]
    if count == 2:
        horizontal = relation in (None, "left", "right")
        cells = [(0, middle), (CELL, middle)] if horizontal else [(middle, 0), (middle, CELL)]
        return cells[::-1] if relation in ("right", "below") else cells
    if count == 3:
        upper = [(middle, 0), (0, CELL), (CELL, CELL)]
        lower = [(0, 0), (CELL, 0), (middle, CELL)]
        return pick(rng, (upper, lower))
    return [(0, 0), (CELL, 0), (0, CELL), (CELL, CELL)]


def _corners(
    rng: np.random.Generator, sizes: list[int], relation: str | None
) -> list[tuple[int, int]]:
    """Top-left corners (x, y) of glyphs that do not overlap and lie inside the picture."""
    cells = _cells(rng, len(sizes), relation)
    return [
        (x + (CELL - size) // 2, y + (CELL - size) // 2)
        for (x, y), size in zip(cells, sizes, strict=True)
    ]


def _background(
    rng: np.random.Generator, category: str, subjects: list[tuple[Noun, str | None]]
) -> tuple[str, bool]:
    """A background that contrasts with every glyph, and whether the caption names it."""
    lost = {
        name
        for noun, color in subjects
        for name in (noun.lost_on if color is None else COLOR_LOST_ON[color])
    }
    options = [name for name in BACKGROUNDS if name not in lost]
    named = category == "background" or rng.random() < 0.06
    if not named and "white" in options and rng.random() < 0.8:
        return "white", False
    return pick(rng, options), named


def sample_scene(
    rng: np.random.Generator,
    num_nouns: int | None = None,
    held_out: bool = False,
    category: str | None = None,
) -> Scene:
    """A random scene with its caption.

    Args:
        rng: the only source of randomness.
        num_nouns: number of NOUNS to use, from the first; None for all.
        held_out: use a held-out pair of nouns or a held-out color of a noun. Otherwise none.
        category: a key of CATEGORIES; None draws one. Of HELD_OUT_CATEGORIES if `held_out`.

    Raises:
        UserError: num_nouns out of range, or no such category.
    """
    pool = _pool(num_nouns)
    names = HELD_OUT_CATEGORIES if held_out else tuple(CATEGORIES)
    if category is not None:
        chosen = category
    elif held_out:
        chosen = pick(rng, names)
    else:
        chosen = names[int(np.searchsorted(_CATEGORY_EDGES, rng.random(), side="right"))]
    if chosen not in names:
        raise UserError(f"unknown category '{chosen}'{nearest(chosen, names)}")
    return _composed(rng, chosen, _subjects(rng, pool, chosen, held_out))


def _composed(
    rng: np.random.Generator, category: str, subjects: list[tuple[Noun, str | None]]
) -> Scene:
    """A scene of the glyphs, with random sizes, positions, background and caption."""
    sizes = _sizes(rng, category, len(subjects))
    relation = None
    if category == "position" or (
        category == "mixed" and len(subjects) == 2 and subjects[0] != subjects[1]
    ):
        relation = pick(rng, tuple(RELATIONS))
    corners = _corners(rng, [size for size, _ in sizes], relation)
    background, named = _background(rng, category, subjects)
    placed = tuple(
        Placed(noun, color, size, *corner, word)
        for (noun, color), (size, word), corner in zip(subjects, sizes, corners, strict=True)
    )
    scene = Scene(category, placed, background, "", relation, named)
    return replace(scene, caption=caption(scene, rng))


def training_scene(
    seed: int, k: int, num_nouns: int | None = None, categories: Sequence[str] | None = None
) -> Scene:
    """Scene number k of a seed; both are non-negative.

    Args:
        seed, k: identify the scene.
        num_nouns: as for sample_scene.
        categories: use only these, with the relative frequencies of CATEGORIES.

    Raises:
        UserError: as sample_scene.
    """
    rng = np.random.default_rng((TRAINING, seed, k))
    if not categories:
        return sample_scene(rng, num_nouns)
    if unknown := [name for name in categories if name not in CATEGORIES]:
        raise UserError(f"unknown category '{unknown[0]}'{nearest(unknown[0], CATEGORIES)}")
    edges = np.cumsum([CATEGORIES[name] for name in categories])
    chosen = categories[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
    return sample_scene(rng, num_nouns, category=chosen)


def noun_scene(name: str, seed: int, k: int) -> Scene:
    """Scene number k of a seed that shows one noun alone, in its own colors.

    Raises:
        UserError: no such noun.
    """
    nouns = {noun.name: noun for noun in NOUNS}
    if name not in nouns:
        raise UserError(f"unknown noun '{name}'{nearest(name, nouns)}")
    rng = np.random.default_rng((ONE_NOUN, seed, k))
    category = pick(rng, ("single_object", "single_object", "single_object", "background", "size"))
    return _composed(rng, category, [(nouns[name], None)])


def validation_scene(k: int, num_nouns: int | None = None) -> Scene:
    """Scene number k of a fixed list; every fourth uses a held-out combination."""
    rng = np.random.default_rng((VALIDATION, 0, k))
    return sample_scene(rng, num_nouns, held_out=k % 4 == 3)
