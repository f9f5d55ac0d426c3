"""Find the glyphs of a scene again in a picture that a model made.

Everything that differs from the plain background is foreground. Its box is cut in two wherever a
row or a column holds little of it, again and again; every box on the way is compared with every
noun in every colour, drawn on the same background; the cuts whose boxes match best win.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train.stickers import sprite
from train.vocabulary import COLOURS, Noun

ACCEPT = 0.62  # least score of a detection
SURE = 0.85  # from here on a box is one object and is not cut further
BASE = 0.5  # a box explains its foreground to the extent that its score is above this
MAX_CUTS = 5  # of a picture until an object

GRID = 24  # pixels of the square in which a box and a glyph are compared
DRAWN = 96  # pixels at which a glyph is drawn before it is shrunk to GRID
COARSE = 0.7  # share of the coarse structure, common to many glyphs, taken out before comparing
FOREGROUND = 20  # least difference from the background in some channel, out of 255
SMALLEST = 14  # pixels of an object's longer side; the scenes' glyphs have 28 and more
INSETS = (0.0, 1.0, 2.0)  # pixels tried on each side, since a blurred glyph's box is too large

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        noun: its name.
        colour: a name of COLOURS, or None if the noun is never given another colour.
        box: (x, y, w, h) in pixels.
        score: likeness to the glyph, ACCEPT to 1.
    """

    noun: str
    colour: str | None
    box: Box
    score: float


def _gaussian(sigma: float) -> np.ndarray:
    """Matrix (GRID, GRID) that blurs a column."""
    x = np.arange(GRID)
    kernel = np.exp(-0.5 * ((x[:, None] - x) / sigma) ** 2)
    return (kernel / kernel.sum(axis=1, keepdims=True)).astype(np.float32)


def _blur(squares: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Blur (N, GRID, GRID, C) in both directions."""
    return np.einsum("ij,njkc,lk->nilc", kernel, squares, kernel, optimize=True)


FINE, ROUGH = _gaussian(0.7), _gaussian(2.0)


def _structure(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, GRID, GRID, C) -> smooth (N, GRID, GRID, C) and without the coarse structure."""
    smooth = _blur(squares, FINE)
    return smooth, smooth - COARSE * _blur(smooth, ROUGH)


def _template(noun: Noun, colour: str | None, font: str | Path | None) -> np.ndarray:
    """The glyph centred in a square, (GRID, GRID, 4): colours times alpha, and alpha, in [0, 1]."""
    drawn = sprite(noun, colour, DRAWN, font)
    h, w = drawn.rgb.shape[:2]
    y, x = (DRAWN - h) // 2, (DRAWN - w) // 2
    square = np.zeros((DRAWN, DRAWN, 4), np.float32)
    square[y : y + h, x : x + w, :3] = drawn.rgb / 255
    square[y : y + h, x : x + w, 3:] = 1 - drawn.keep / 256
    step = DRAWN // GRID
    return square.reshape(GRID, step, GRID, step, 4).mean(axis=(1, 3))


class Detector:
    """Finds `nouns` in pictures.

    Args:
        nouns: the candidates.
        font: path of the font; None looks in the usual places.
    """

    def __init__(self, nouns: Sequence[Noun], font: str | Path | None = None):
        looks = [(n, c) for n in nouns for c in ((None, *COLOURS) if n.recolour else (None,))]
        self.nouns = np.array([noun.name for noun, _ in looks])
        self.colours = [noun.own_colour if colour is None else colour for noun, colour in looks]
        self._glyphs = np.stack([_template(noun, colour, font) for noun, colour in looks])
        self._smooth, self._fine = _structure(self._glyphs)

    def __call__(self, picture: np.ndarray) -> list[Detection]:
        """What `picture`, uint8 (H, W, 3), shows, best first."""
        background = _background(picture)
        mask = _foreground(picture, background)
        smooth, fine = (_over(t, background) for t in (self._smooth, self._fine))
        found: dict[Box, Detection] = {}
        cuts: dict[Box, list[list[Box]]] = {}
        whole = _tight(mask, (0, 0, mask.shape[1], mask.shape[0]))
        level = [whole] if whole else []
        for _ in range(MAX_CUTS + 1):
            if not level:
                break
            squares = np.concatenate([_squares(picture, background, box) for box in level])
            of_level = self._classify(squares, smooth, fine, level)
            for detection in of_level:
                found[detection.box] = detection
                if detection.score < SURE:
                    cuts[detection.box] = _cuts(mask, detection.box)
            level = list({b for box in level for cut in cuts.get(box, ()) for b in cut if b not in found})
        return sorted(_explain(whole, mask, found, cuts)[1], key=lambda d: -d.score) if whole else []

    def _classify(self, squares, smooth, fine, boxes) -> list[Detection]:
        s, f = (x.reshape(len(x), -1) for x in _structure(squares))
        scores = _likeness(f, fine).reshape(len(boxes), len(INSETS), -1)
        inset, label = np.unravel_index(scores.reshape(len(boxes), -1).argmax(1), scores.shape[1:])
        out = []
        for k, box in enumerate(boxes):
            i, j = inset[k], label[k]
            same = np.flatnonzero(self.nouns == self.nouns[j])
            near = _likeness(s[k * len(INSETS) + i][None], smooth[same])[0]
            colour = self.colours[same[near.argmax()]]
            out.append(Detection(str(self.nouns[j]), colour, box, float(scores[k, i, j])))
        return out


def _explain(box, mask, found, cuts):
    own = found.get(box)
    if own is None:
        return 0.0, ()
    x, y, w, h = box
    best = (mask[y : y + h, x : x + w].sum() * (own.score - BASE), (own,)) if own.score >= ACCEPT else (0.0, ())
    for cut in cuts.get(box, ()):
        parts = [_explain(part, mask, found, cuts) for part in cut]
        value = sum(v for v, _ in parts)
        if value > best[0]:
            best = value, tuple(d for _, ds in parts for d in ds)
    return best


def _background(picture):
    frame = np.ones(picture.shape[:2], bool)
    frame[2:-2, 2:-2] = False
    return np.median(picture[frame], axis=0)


def _foreground(picture, background):
    p = np.pad(picture.astype(np.float32) - background.astype(np.float32), ((1, 1), (1, 1), (0, 0)))
    p = p[:-2] + p[1:-1] + p[2:]
    p = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    return np.abs(p).max(-1) > 9 * FOREGROUND


def _tight(mask, box):
    x, y, w, h = box
    inside = mask[y : y + h, x : x + w]
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    if not len(columns) or max(np.ptp(columns), np.ptp(rows)) + 1 < SMALLEST:
        return None
    return (
        x + int(columns[0]),
        y + int(rows[0]),
        int(columns[-1] - columns[0]) + 1,
        int(rows[-1] - rows[0]) + 1,
    )


def _cuts(mask, box):
    x, y, w, h = box
    inside = mask[y : y + h, x : x + w]
    out = []
    for axis in (0, 1):
        counts = inside.sum(axis)
        for k in _valleys(counts):
            if axis == 0:
                halves = (x, y, k, h), (x + k, y, w - k, h)
            else:
                halves = (x, y, w, k), (x, y + k, w, h - k)
            parts = [t for t in (_tight(mask, half) for half in halves) if t]
            if parts and parts != [box]:
                out.append(parts)
    return out


def _valleys(counts):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts == 0, [0]]).astype(int)))
    gaps = edges.reshape(-1, 2)
    if len(gaps):
        widest = gaps[np.argsort(gaps[:, 0] - gaps[:, 1], kind="stable")][:4]
        return [int(g.mean()) for g in widest]
    if len(counts) < 2 * SMALLEST:
        return []
    inner = counts[SMALLEST:-SMALLEST]
    return [SMALLEST + int(inner.argmin())] if len(inner) else []


def _squares(picture, background, box):
    x, y, w, h = box
    side = max(w, h)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = np.rint(background)
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top : top + h, left : left + w] = picture[y : y + h, x : x + w]
    image = Image.fromarray(canvas)
    out = []
    for inset in INSETS:
        out.append(np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX, box=(inset, inset, side - inset, side - inset))))
    return np.stack(out).astype(np.float32) / 255 - (background / 255).astype(np.float32)


def _over(t, background):
    return (t[..., :3] - (background / 255).astype(np.float32) * t[..., 3:]).reshape(len(t), -1)


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """1 - |a - b|^2 / (|a|^2 + |b|^2) of the rows of a (N, D) and b (M, D): (N, M)."""
    energy = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("md,md->m", b, b)
    return 2 * (a @ b.T) / np.maximum(energy, 1e-6)
