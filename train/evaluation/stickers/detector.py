"""Find the glyphs of a scene in a picture that a model drew.

Everything that differs from the plain background is foreground. Its box is cut in two, repeatedly,
where a row or a column has little foreground or none. Every box is compared with every noun in
every color, drawn on the same background. The cuts whose boxes match best are chosen.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.stickers.vocabulary import NOTO, Collection, Noun

ACCEPT = 0.96  # least score of a detection
SURE = 1.15  # from this score on a box is one object and is not cut
BASE = 0.7  # a box explains its foreground in proportion to its score above this

FOREGROUND = 20  # least difference from the background in some channel, out of 255
MARGIN = 2  # pixels around a detection that still belong to it
SMALLEST = 24  # pixels of an object's longer side; that of the scenes' is greater
EDGE_WEIGHT = 2.0  # of edges against colors, when a box and a glyph are compared
MAX_CUTS = 5  # in sequence, from the whole picture to an object
MAX_BOXES = 24  # compared at each level of cuts; only chaotic pictures have more
THICKEST = 0.4  # without a gap: limit of the thickness at a cut, relative to elsewhere
TOUCHING = 0.75  # the same at a cut near the middle, where two big objects may touch
GAP = 3  # empty rows or columns that a glyph without a gap does not have
MAX_GAPS = 3  # empty runs of rows or columns that are tried for one cut

GRID, POOLED = 24, 8  # sides of the squares that boxes are drawn in, and of their features
DRAWN = 96  # pixels at which a glyph is drawn before it is shrunk to GRID
INSETS = (0, 1, 2)  # pixels tried on each side, because a blurred glyph's box is too large
SEEN = 128  # pixels of the shorter side of a square picture, to which larger ones are shrunk
BIN, MOST_BINS = 16, 32  # width of a bin of colors, out of 255, and bins that may be the background
TINT = 16  # background colors are rounded to multiples of this, out of 255, to cache templates

Box = tuple[int, int, int, int]
"""(x, y, w, h) in pixels."""


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        noun: its name.
        color: a name of the collection's colors, or None if the noun is never given another.
        box: (x, y, w, h) in pixels.
        score: similarity to the glyph (at most 1) plus its margin over the next most similar noun.
    """

    noun: str
    color: str | None
    box: Box
    score: float


class Detector:
    """Finds `nouns` in pictures.

    Args:
        nouns: the candidates.
        font: path of the font; None: the collection's pictures, or the font in the usual places.
        collection: of the nouns. Its pictures are seen at `SEEN` pixels.
    """

    def __init__(
        self,
        nouns: Sequence[Noun],
        font: str | Path | None = None,
        *,
        collection: Collection = NOTO,
    ):
        self.nouns, self.step = tuple(nouns), min(collection.size) // SEEN
        self._colors = [
            (None, *collection.colors) if noun.recolor else (None,) for noun in self.nouns
        ]
        self._glyphs = np.stack(
            [
                _glyph(noun, color, font, collection=collection)
                for noun, colors in zip(self.nouns, self._colors, strict=True)
                for color in colors
            ]
        )
        self._starts = np.cumsum([0] + [len(colors) for colors in self._colors])
        # In NOTO no glyph looks like two others side by side, as a pair of sunglasses does.
        self._whole = {
            noun.name
            for noun, start in zip(self.nouns, self._starts, strict=False)
            if collection is not NOTO and not _has_gap(self._glyphs[start, ..., -1] > 0.05, 1)
        }
        self._templates = functools.lru_cache(maxsize=16)(self._templates_on)

    def __call__(self, picture: np.ndarray) -> list[Detection]:
        """The objects in `picture`, uint8 (H, W, C), best first.

        With alpha the colors are times alpha.
        """
        picture = self._seen(picture)
        background = background_color(picture)
        mask = foreground(picture, background)
        whole = _tight(mask, (0, 0, mask.shape[1], mask.shape[0]))
        found: dict[Box, Detection] = {}
        cuts: dict[Box, list[list[Box]]] = {}
        level = [whole] if whole else []
        for _ in range(MAX_CUTS + 1):
            found |= {d.box: d for d in self._classify(picture, background, level)}
            for box in level:
                x, y, w, h = box
                inside = mask[y : y + h, x : x + w]
                if found[box].noun in self._whole and _has_gap(inside, GAP):
                    found[box] = replace(found[box], score=0.0)
            cuts |= {box: _cuts(mask, box) for box in level if found[box].score < SURE}
            parts = [part for box in level for cut in cuts.get(box, ()) for part in cut]
            level = [box for box in dict.fromkeys(parts) if box not in found][:MAX_BOXES]
        _, detections = _explain(whole, mask, found, cuts, {})
        found_ = [replace(d, box=_scaled(d.box, self.step)) for d in detections]
        return sorted(found_, key=lambda d: -d.score)

    def leftover(self, picture: np.ndarray, detections: Sequence[Detection]) -> float:
        """Foreground outside all `detections`, in units of their mean foreground; 0 for none."""
        picture = self._seen(picture)
        mask = foreground(picture, background_color(picture))
        total = mask.sum()
        for x, y, w, h in (_scaled(d.box, 1 / self.step) for d in detections):
            mask[max(y - MARGIN, 0) : y + h + MARGIN, max(x - MARGIN, 0) : x + w + MARGIN] = False
        explained = total - mask.sum()
        return float(mask.sum() * len(detections) / explained) if explained else 0.0

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        """The picture at `SEEN` pixels."""
        if self.step == 1:
            return picture
        height, width = picture.shape[:2]
        cells = picture.reshape(height // self.step, self.step, width // self.step, self.step, -1)
        return np.rint(cells.mean(axis=(1, 3))).astype(np.uint8)

    def _templates_on(self, background: tuple[float, ...]) -> np.ndarray:
        """Features of all glyphs over a background, in [0, 1]."""
        glyphs, alpha = self._glyphs[..., : len(background)], self._glyphs[..., -1:]
        return _features(glyphs - np.array(background, np.float32) * alpha)

    def _classify(
        self, picture: np.ndarray, background: np.ndarray, boxes: list[Box]
    ) -> list[Detection]:
        """The most similar noun of each box."""
        if not boxes:
            return []
        squares = np.concatenate([_squares(picture, background, box) for box in boxes])
        features = _features(squares)
        tint = np.minimum(np.rint(background / TINT) * TINT, 255) / 255
        templates = self._templates(tuple(tint.tolist()))
        likeness = _likeness(features, templates).reshape(len(boxes), len(INSETS), -1).max(axis=1)
        of_noun = np.maximum.reduceat(likeness, self._starts[:-1], axis=1)
        out = []
        for k, box in enumerate(boxes):
            second, first = np.argsort(of_noun[k])[-2:]
            noun = self.nouns[first]
            look = likeness[k, self._starts[first] : self._starts[first + 1]].argmax()
            color = self._colors[first][look] or noun.own_color
            score = 2 * of_noun[k, first] - of_noun[k, second]
            out.append(Detection(noun.name, color, box, float(score)))
        return out


def background_color(picture: np.ndarray) -> np.ndarray:
    """(C,) the most frequent color of the two outermost pixels all round."""
    rim = np.ones(picture.shape[:2], bool)
    rim[2:-2, 2:-2] = False
    colors = picture[rim]
    # Of the medians of the fullest bins; the bins alone would split a color at their edges.
    _, kinds, counts = np.unique(colors // BIN, axis=0, return_inverse=True, return_counts=True)
    fullest = np.argsort(-counts, kind="stable")[:MOST_BINS]
    found = np.stack([np.median(colors[kinds.reshape(-1) == k], axis=0) for k in fullest])
    far = np.abs(colors.astype(np.float32) - found[:, None]).max(axis=-1)
    return found[(far < FOREGROUND).sum(axis=1).argmax()].astype(np.float32)


def foreground(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W) bool: where the picture, smoothed over 3x3 pixels, is not the background."""
    difference = np.pad(picture - background, ((1, 1), (1, 1), (0, 0)))
    rows = difference[:-2] + difference[1:-1] + difference[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return np.abs(total).max(axis=-1) > 9 * FOREGROUND


def _tight(mask: np.ndarray, box: Box) -> Box | None:
    """The part of `box` that the mask fills; None if that is too small for an object."""
    x, y, w, h = box
    inside = mask[y : y + h, x : x + w]
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    if not len(rows):
        return None
    (left, right), (top, bottom) = columns[[0, -1]].tolist(), rows[[0, -1]].tolist()
    w, h = right - left + 1, bottom - top + 1
    return (x + left, y + top, w, h) if max(w, h) >= SMALLEST else None


def _has_gap(inside: np.ndarray, least: int) -> bool:
    """Whether `least` neighboring rows or columns between filled ones are empty."""
    for filled in (inside.any(axis=0), inside.any(axis=1)):
        if (np.diff(np.flatnonzero(filled)) > least).any():
            return True
    return False


def _cuts(mask: np.ndarray, box: Box) -> list[list[Box]]:
    """The ways to cut `box` in two, each as the tight boxes of its parts."""
    x, y, w, h = box
    inside = mask[y : y + h, x : x + w]
    halves = [((x, y, k, h), (x + k, y, w - k, h)) for k in _valleys(inside.sum(axis=0))]
    halves += [((x, y, w, k), (x, y + k, w, h - k)) for k in _valleys(inside.sum(axis=1))]
    cuts = [[part for half in pair if (part := _tight(mask, half))] for pair in halves]
    return [parts for parts in cuts if parts]


def _valleys(counts: np.ndarray) -> list[int]:
    """Where to cut: in the widest gaps, or, without any, at thin places and near the middle."""
    edges = np.flatnonzero(np.diff(counts == 0))
    gaps = edges.reshape(-1, 2)  # the box is tight, so that both ends are filled
    if len(gaps):
        widest = np.argsort(gaps[:, 0] - gaps[:, 1], kind="stable")[:MAX_GAPS]
        return [int(gaps[k].sum()) // 2 + 1 for k in widest]
    inner = counts[SMALLEST:-SMALLEST]
    if not len(inner):
        return []
    thin = [SMALLEST + int(inner.argmin())] if inner.min() <= THICKEST * counts.max() else []
    start = len(counts) * 2 // 5
    middle = start + int(counts[start : len(counts) - start].argmin())
    return list(
        dict.fromkeys([*thin, middle] if counts[middle] <= TOUCHING * counts.max() else thin)
    )


Account = tuple[float, tuple[Detection, ...]]
"""An explanation of a box: how much foreground its detections cover, and the detections."""


def _explain(
    box: Box | None,
    mask: np.ndarray,
    found: dict[Box, Detection],
    cuts: dict[Box, list[list[Box]]],
    known: dict[Box, Account],
) -> Account:
    """The best explanation of a box, as one object or in parts; `known` is a cache."""
    if box not in found:
        return 0.0, ()
    if box in known:
        return known[box]
    best = 0.0, ()
    detection = found[box]
    if detection.score >= ACCEPT:
        x, y, w, h = box
        mass = int(mask[y : y + h, x : x + w].sum())
        best = mass * (detection.score - BASE), (detection,)
    for cut in cuts.get(box, ()):
        accounts = [_explain(part, mask, found, cuts, known) for part in cut]
        total = sum(value for value, _ in accounts)
        if total > best[0]:
            best = total, tuple(d for _, detections in accounts for d in detections)
    known[box] = best
    return best


def _scaled(box: Box, factor: float) -> Box:
    x, y, w, h = (round(side * factor) for side in box)
    return x, y, w, h


def _glyph(
    noun: Noun, color: str | None, font: str | Path | None, *, collection: Collection
) -> np.ndarray:
    """A glyph in the middle of a square, (GRID, GRID, 4): color times alpha, and alpha."""
    from train.data.stickers.render import sprite  # measures of other models need no font

    drawn = sprite(noun, color, DRAWN, font, collection=collection)
    h, w = drawn.rgb.shape[:2]
    y, x = (DRAWN - h) // 2, (DRAWN - w) // 2
    square = np.zeros((DRAWN, DRAWN, 4), np.float32)
    square[y : y + h, x : x + w, :3] = drawn.rgb / 255
    square[y : y + h, x : x + w, 3:] = 1 - drawn.keep / 256
    step = DRAWN // GRID
    return square.reshape(GRID, step, GRID, step, 4).mean(axis=(1, 3))


def _squares(picture: np.ndarray, background: np.ndarray, box: Box) -> np.ndarray:
    """A box in the middle of a square, minus the background: (INSETS, GRID, GRID, C)."""
    x, y, w, h = box
    side = max(w, h)
    square = np.empty((side, side, picture.shape[-1]), np.uint8)
    square[:] = np.rint(background)
    top, left = (side - h) // 2, (side - w) // 2
    square[top : top + h, left : left + w] = picture[y : y + h, x : x + w]
    # Not RGBA, whose colors Pillow would multiply by alpha once more.
    mode = "RGB" if square.shape[-1] == 3 else "RGBa"
    image = Image.frombytes(mode, (side, side), square.tobytes())
    shrunk = [
        image.resize((GRID, GRID), Image.Resampling.BOX, box=(k, k, side - k, side - k))
        for k in INSETS
    ]
    return (np.stack([np.asarray(s) for s in shrunk]) - background) / 255


def _gaussians(rows: int, sigma: float) -> np.ndarray:
    """(rows, GRID): evenly spaced Gaussian windows over GRID pixels."""
    centers = (np.arange(rows) + 0.5) * GRID / rows - 0.5
    windows = np.exp(-0.5 * ((np.arange(GRID) - centers[:, None]) / sigma) ** 2)
    return (windows / windows.sum(axis=1, keepdims=True)).astype(np.float32)


_SMOOTH, _POOL = _gaussians(GRID, 0.5), _gaussians(POOLED, 1.5)


def _filter(windows: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.einsum("ij,njkc,lk->nilc", windows, squares, windows, optimize=True)


def _features(squares: np.ndarray) -> np.ndarray:
    """Color and edges of four directions, pooled for tolerance to small deformations.

    Args:
        squares: (N, GRID, GRID, C), zero where there is background.

    Returns:
        (N, 5 C POOLED^2).
    """
    smooth = _filter(_SMOOTH, squares)
    padded = np.pad(smooth, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    edges = [EDGE_WEIGHT * np.maximum(d, 0) for d in (dx, -dx, dy, -dy)]
    return _filter(_POOL, np.concatenate([smooth, *edges], axis=-1)).reshape(len(squares), -1)


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - |a - b|^2 / (|a|^2 + |b|^2) of the rows of a (N, D) and b (M, D): (N, M)."""
    energy = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("md,md->m", b, b)
    return 2 * (a @ b.T) / np.maximum(energy, 1e-6)
