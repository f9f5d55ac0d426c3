"""Find the glyphs of a rendered scene again, in a picture that a model made of it.

Everything that differs from the plain background is foreground. The foreground's box is cut in two
wherever a row or column holds little of it, again and again; every box on the way is compared with
every noun in every colour, drawn on the same background; the cuts whose boxes match best win.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from train.stickers import sprite
from train.vocabulary import COLOURS, Noun

SIDE = 24  # pixels of the square in which box and template are compared
DRAWN = 96  # pixels at which a template is drawn before it shrinks to SIDE
FOREGROUND = 20  # least difference from the background, out of 255, in one channel
SMALLEST = 14  # pixels of an object's longer side; the scenes' smallest glyph has 28
ACCEPT = 0.62  # least score of a detection, see `_matches`
SURE = 0.85  # from here on a box is not cut further
MAX_DEPTH = 5


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    Attributes:
        noun: its name.
        colour: a name of COLOURS, or None if the noun comes in its own colours only.
        box: (x, y, w, h) in pixels.
        score: likeness to the noun's glyph, at most 1.
    """

    noun: str
    colour: str | None
    box: tuple[int, int, int, int]
    score: float


class Detector:
    """Detects `nouns` in pictures.

    Args:
        nouns: the candidates.
        font: path of the font; None looks in the usual places.
    """

    def __init__(self, nouns: tuple[Noun, ...], font: str | Path | None = None):
        self.nouns = nouns
        self.labels: list[tuple[int, str | None]] = []
        rgb, alpha = [], []
        for k, noun in enumerate(nouns):
            for colour in (None, *COLOURS) if noun.recolour else (None,):
                self.labels.append((k, colour))
                one = _square_template(noun, colour, font)
                rgb.append(one[..., :3])
                alpha.append(one[..., 3:])
        self.rgb, self.alpha = np.stack(rgb), np.stack(alpha)

    def __call__(self, picture: np.ndarray) -> list[Detection]:
        """Detections in `picture`, uint8 (H, W, 3), best first."""
        return []


def _square_template(noun: Noun, colour: str | None, font) -> np.ndarray:
    """(SIDE, SIDE, 4) float32 in [0, 1]: colours times alpha, and alpha."""
    drawn = sprite(noun, colour, DRAWN, font)
    h, w = drawn.rgb.shape[:2]
    canvas = np.zeros((DRAWN, DRAWN, 4), np.uint8)
    y, x = (DRAWN - h) // 2, (DRAWN - w) // 2
    canvas[y : y + h, x : x + w, :3] = drawn.rgb
    canvas[y : y + h, x : x + w, 3:] = 255 - np.minimum(drawn.keep, 255)
    channels = [
        Image.fromarray(canvas[..., c]).resize((SIDE, SIDE), Image.Resampling.BOX) for c in range(4)
    ]
    return np.stack([np.asarray(c) for c in channels], -1).astype(np.float32) / 255
