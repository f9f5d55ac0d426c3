"""GenEval-style prompts, and GenEval's rules (arXiv 2310.11513) for what a picture must show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.stickers.captions import Scene, plain_caption
from train.data.stickers.scenes import HELD_OUT_CATEGORIES, sample_scene
from train.evaluation.stickers.detector import Box, Detection

SIX = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
"""GenEval's categories."""

PROMPTS = 2  # first word of a prompt's random seed, beside those of scenes.py
DEAD_ZONE = 0.1  # of the sum of two boxes' sizes; smaller offsets are no relation
MIN_COSINE = 0.5  # between an offset and the direction that a relation names
MAX_LEFTOVER = 0.5
SEEDS_PER_CATEGORY = 10_000


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its picture must show.

    Attributes:
        text: the prompt itself.
        scene: its category, and the objects that must be detected.
        held_out: whether this combination never occurs in training.
        number: index among all prompts; it does not depend on the number of prompts in use.
    """

    text: str
    scene: Scene
    held_out: bool
    number: int


def fixed_prompts(per_category: int, num_nouns: int | None = None) -> list[Prompt]:
    """The first prompts of each of the `SIX` categories.

    Every other one is in plain wording, the rest in free wording. In the categories that combine
    things, a quarter are combinations held out of training.
    """
    prompts = []
    for c, category in enumerate(SIX):
        for k in range(per_category):
            held_out = category in HELD_OUT_CATEGORIES and k // 2 % 4 == 3
            rng = np.random.default_rng((PROMPTS, c, k))
            scene = sample_scene(rng, num_nouns, held_out, category)
            text = scene.caption if k % 2 else plain_caption(scene)
            prompts.append(Prompt(text, scene, held_out, c * SEEDS_PER_CATEGORY + k))
    return prompts


def relations(a: Box, b: Box) -> set[str]:
    """Relations of box `a` to box `b`, keys of captions.RELATIONS, by GenEval's rule."""
    centers = np.array([[x + w / 2, y + h / 2] for x, y, w, h in (a, b)])
    offset = centers[0] - centers[1]
    zone = DEAD_ZONE * (np.array(a[2:]) + np.array(b[2:]))
    dx, dy = np.sign(offset) * np.maximum(np.abs(offset) - zone, 0) / max(np.hypot(*offset), 1e-6)
    cosines = {"left": -dx, "right": dx, "above": -dy, "below": dy}
    return {name for name, cosine in cosines.items() if cosine > MIN_COSINE}


def is_correct(scene: Scene, detections: Sequence[Detection], leftover: float = 0.0) -> bool:
    """Whether a picture with these detections, best first, shows `scene`.

    Stricter than GenEval in one point: for a count, the unexplained foreground must be smaller than
    `MAX_LEFTOVER` objects, since three objects and a malformed fourth are not three.
    """
    matches = [
        [d for d in detections if d.noun == placed.noun.name and placed.color in (None, d.color)]
        for placed in scene.placed
    ]
    if scene.category == "counting":
        return len(matches[0]) == len(scene.placed) and leftover < MAX_LEFTOVER
    if not all(matches):
        return False
    if scene.relation is None:
        return True
    return scene.relation in relations(matches[0][0].box, matches[1][0].box)


def accuracies(prompts: Sequence[Prompt], correct: Sequence[bool]) -> dict[str, float | None]:
    """Per category of `SIX`, `overall` (their mean) and `held_out` (mean over its categories).

    `overall_error` is the standard error of `overall`, with as many prompts in each category;
    `held_out` is None without held-out prompts.
    """

    def share(category: str, held_out: bool) -> float:
        chosen = [
            ok
            for p, ok in zip(prompts, correct, strict=True)
            if p.scene.category == category and (p.held_out or not held_out)
        ]
        return float(np.mean(chosen))

    shares = np.array([share(category, held_out=False) for category in SIX])
    variance = (shares * (1 - shares)).mean() / len(prompts)
    held_out = None
    if any(prompt.held_out for prompt in prompts):
        held_out = float(np.mean([share(category, True) for category in HELD_OUT_CATEGORIES]))
    return dict(zip(SIX, shares.tolist(), strict=True)) | {
        "overall": float(shares.mean()),
        "overall_error": float(np.sqrt(variance)),
        "held_out": held_out,
    }
