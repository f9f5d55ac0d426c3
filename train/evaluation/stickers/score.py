"""GenEval-style scores of sticker models."""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import announce, picture_bar
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.vocabulary import with_article
from train.data.stickers.captions import plain_caption
from train.data.stickers.scenes import noun_scene
from train.data.stickers.vocabulary import NOTO, Collection, collection_of, known_nouns
from train.evaluation.stickers.detector import Detection, Detector
from train.evaluation.stickers.geneval import Prompt, accuracies, fixed_prompts, is_correct

SCORED_STEPS = 14  # maximum steps of a quick score


@functools.lru_cache(maxsize=2)
def detector(
    num_nouns: int | None = None, also: str | None = None, *, collection: Collection = NOTO
) -> Detector:
    """The detector of the first `num_nouns` nouns, and of the one named `also`."""
    nouns = collection.first(num_nouns)
    more = [noun for noun in collection.nouns if noun.name == also and noun not in nouns]
    return Detector([*nouns, *more], collection=collection)


def judge(
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    *,
    num_nouns: int | None,
    also: str | None = None,
    collection: Collection = NOTO,
) -> tuple[list[bool], list[list[Detection]]]:
    """For each picture, uint8 (H, W, C): whether it is correct, and the detections.

    `num_nouns`, `also` and `collection` are those of `detector`.
    """
    with announce("drawing the detector's glyphs ..."):
        detect = detector(num_nouns, also, collection=collection)
    found = [detect(p) for p in tqdm(pictures, desc="detector", unit="picture", leave=False)]
    correct = [
        is_correct(prompt.scene, detections, detect.leftover(picture, detections))
        for prompt, picture, detections in zip(prompts, pictures, found, strict=True)
    ]
    return correct, found


def draw(
    components: Components,
    prompts: Sequence[Prompt],
    *,
    settings: DrawSettings,
    share: float = 1.0,
    name: str = "sampling",
    batch_size: int = 16,
) -> list[np.ndarray]:
    """Pictures of prompts. The seed of each is that of `settings` plus the prompt's number.

    Those of one size in a row are drawn together.
    """
    first, pictures = settings.seed or 0, []
    collection = collection_of(components)
    with picture_bar(len(prompts), name) as progress:
        for size, group in itertools.groupby(prompts, key=lambda prompt: prompt.scene.size):
            chosen = list(group)
            if len(collection.shapes) > 1:
                settings = replace(settings, height=size[0], width=size[1])
            drawn = draw_pictures(
                components,
                [prompt.text for prompt in chosen],
                seeds=[first + prompt.number for prompt in chosen],
                settings=settings,
                share=share,
                batch_size=batch_size,
                progress=progress,
            )
            pictures.extend(drawn)
    return pictures


def quick_score(
    components: Components,
    num_nouns: int | None = None,
    *,
    per_category: int = 8,
    steps: int = SCORED_STEPS,
    share: float = 1.0,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """The accuracies of one width over few prompts; `pictures` are those of Fluent Emoji."""
    collection = collection_of(components, pictures)
    prompts = fixed_prompts(per_category, num_nouns, collection=collection)
    settings = DrawSettings(num_inference_steps=steps)
    drawn = draw(components, prompts, settings=settings, share=share)
    correct, _ = judge(prompts, drawn, num_nouns=num_nouns, collection=collection)
    return accuracies(prompts, correct)


def score_cell(
    components: Components, share: float, *, per_category: int, pictures: Path | None = None
) -> str:
    """`quick_score` of a model in its own vocabulary, in at most `SCORED_STEPS`, for a table."""
    scores = quick_score(
        components,
        known_nouns(components),
        per_category=per_category,
        steps=min(SCORED_STEPS, components.config.sampler.num_inference_steps),
        share=share,
        pictures=pictures,
    )
    return f"{scores['overall']:.3f} ± {scores['overall_error']:.3f}"


NOUN_SEED = 1  # `train.stickers --noun` writes the scenes of seed 0 by default


def noun_prompts(name: str, count: int, *, collection: Collection = NOTO) -> list[Prompt]:
    """Prompts for one noun alone, every other one in plain wording."""
    scenes = [noun_scene(name, NOUN_SEED, k, collection=collection) for k in range(count)]
    texts = [s.caption if k % 2 else plain_caption(s) for k, s in enumerate(scenes)]
    return [
        Prompt(text, s, False, k) for k, (text, s) in enumerate(zip(texts, scenes, strict=True))
    ]


def gallery_prompts(
    count: int, num_nouns: int | None, *, collection: Collection = NOTO
) -> list[str]:
    """Up to `count` prompts such as "an apple", of evenly spaced nouns of the list."""
    nouns = collection.first(num_nouns)
    count = min(count, len(nouns))
    return [with_article(nouns[k * len(nouns) // count].name) for k in range(count)]
