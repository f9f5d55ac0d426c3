"""GenEval-style prompts, and GenEval's rules (arXiv 2310.11513) for what a picture must show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.stickers.captions import Scene, plain_caption
from train.data.stickers.scenes import HELD_OUT_CATEGORIES, sample_scene
from train.data.stickers.vocabulary import NOTO, Collection
from train.evaluation.stickers.detector import Box, Detection

SIX = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")
"""GenEval's categories."""

FIVE_AND_SIX = "five_and_six"
"""Counts above `MOST_COUNTED`, a group of its own."""
COUNTED = {FIVE_AND_SIX: "counting"}
MOST_COUNTED = 4
SIZE_ERROR = 1.12
"""Largest ratio of a thing's size and the one that its size word means."""

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
        group: what is scored: the scene's category, or `FIVE_AND_SIX`, or a size such as 256x384.
    """

    text: str
    scene: Scene
    held_out: bool
    number: int
    group: str = ""

    def __post_init__(self):
        if not self.group:
            object.__setattr__(self, "group", self.scene.category)


def fixed_prompts(
    per_category: int, num_nouns: int | None = None, *, collection: Collection = NOTO
) -> list[Prompt]:
    """The first prompts of each of the `SIX` categories.

    A collection with more sizes, numbers or shapes than NOTO has more groups of prompts: size
    words, five and six things, and the six categories in each other shape.

    Every other prompt is in plain wording, the rest in free wording. In the categories that combine
    things, a quarter (half in the other shapes) are combinations held out of training.
    """
    sizes = [size for size in collection.shapes if size != collection.size]
    groups: list[tuple[str, tuple[int, int]]] = [(name, collection.size) for name in SIX]
    if collection is not NOTO:
        groups += [("size", collection.size), (FIVE_AND_SIX, collection.size)]
    groups += [(f"{height}x{width}", (height, width)) for height, width in sizes]
    prompts = []
    for c, (group, size) in enumerate(groups):
        for k in range(per_category):
            of_size = size != collection.size
            category = SIX[k // 2 % 6] if of_size else COUNTED.get(group, group)
            # A category of another size has only every sixth pair of prompts.
            held_out = k // 12 % 2 == 1 if of_size else k // 2 % 4 == 3
            held_out = held_out and category in HELD_OUT_CATEGORIES
            rng = np.random.default_rng((PROMPTS, c, k))
            while True:
                scene = sample_scene(
                    rng, num_nouns, held_out, category, collection=collection, size=size
                )
                many = len(scene.placed) > MOST_COUNTED
                if category != "counting" or of_size or many == (group == FIVE_AND_SIX):
                    break
            text = scene.caption if k % 2 else plain_caption(scene)
            prompts.append(Prompt(text, scene, held_out, c * SEEDS_PER_CATEGORY + k, group))
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
    things = {(placed.noun.name, placed.color) for placed in scene.placed}
    if scene.category == "counting" or (len(scene.placed) > 1 and len(things) == 1):
        right = len(matches[0]) == len(scene.placed) and leftover < MAX_LEFTOVER
        return right and _sizes_fit(scene, [[d] for d in matches[0]])
    if not all(matches) or not _sizes_fit(scene, matches):
        return False
    if scene.relation is None:
        return True
    return scene.relation in relations(matches[0][0].box, matches[1][0].box)


def _sizes_fit(scene: Scene, matches: Sequence[Sequence[Detection]]) -> bool:
    """Whether the best match of each glyph has the size that the scene's words mean."""
    if scene.category != "size":
        return True
    return all(
        1 / SIZE_ERROR < max(found[0].box[2:]) / placed.size_px < SIZE_ERROR
        for placed, found in zip(scene.placed, matches, strict=True)
    )


def accuracies(prompts: Sequence[Prompt], correct: Sequence[bool]) -> dict[str, float | None]:
    """Per group of prompts, `overall` (their mean) and `held_out` (mean over its categories).

    `overall_error` is the standard error of `overall`, with as many prompts in each group;
    `held_out` is None without held-out prompts.
    """
    results = list(zip(prompts, correct, strict=True))
    groups = list(dict.fromkeys(prompt.group for prompt in prompts))
    shares = np.array(
        [np.mean([ok for prompt, ok in results if prompt.group == group]) for group in groups]
    )
    variance = (shares * (1 - shares)).mean() / len(prompts)
    held_out = [
        float(np.mean(chosen))
        for category in HELD_OUT_CATEGORIES
        if (chosen := [ok for p, ok in results if p.held_out and p.scene.category == category])
    ]
    return dict(zip(groups, shares.tolist(), strict=True)) | {
        "overall": float(shares.mean()),
        "overall_error": float(np.sqrt(variance)),
        "held_out": float(np.mean(held_out)) if held_out else None,
    }
