"""Tables and marked pictures of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mlx_snapgen.alpha import checkerboard, over
from train.data.stickers.vocabulary import NOTO, Collection
from train.evaluation.stickers.geneval import Prompt, accuracies
from train.evaluation.stickers.score import judge

SUMMARY = ("overall", "overall_error", "held_out")
"""Keys of the scores that are no group of prompts."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: a width, or the pictures of an upper limit.
        scores: see `accuracies`.
        validation_losses: one per noise level; empty for an upper limit.
        seconds_per_picture: of sampling, in batches; None for an upper limit.
        judged: for each picture the prompt, the detections, and whether they are correct.
    """

    name: str
    scores: dict[str, float | None]
    validation_losses: list[float]
    seconds_per_picture: float | None
    judged: list[dict]


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    groups = [name for name in rows[0].scores if name not in SUMMARY]
    titles = ["", *(name.replace("_", " ") for name in groups)]
    titles += ["overall", "held-out", "validation loss", "s / picture"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for row in rows:
        s, losses, seconds = row.scores, row.validation_losses, row.seconds_per_picture
        lines.append(
            [
                row.name,
                *(f"{s[group]:.2f}" for group in groups),
                f"{s['overall']:.3f} ± {s['overall_error']:.3f}",
                "" if s["held_out"] is None else f"{s['held_out']:.2f}",
                f"{np.mean(losses):.4f}" if losses else "",
                "" if seconds is None else f"{seconds:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make_row(
    name: str,
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    *,
    num_nouns: int | None,
    collection: Collection = NOTO,
    losses: Sequence[float] = (),
    seconds: float | None = None,
) -> Row:
    """The row of the pictures, uint8 (H, W, C), of prompts."""
    correct, found = judge(prompts, pictures, num_nouns=num_nouns, collection=collection)
    records = [
        {
            "prompt": prompt.text,
            "category": prompt.scene.category,
            "held_out": prompt.held_out,
            "correct": ok,
            "found": [
                {"noun": d.noun, "colour": d.color, "box": d.box, "score": d.score}
                for d in detections
            ],
        }
        for prompt, ok, detections in zip(prompts, correct, found, strict=True)
    ]
    return Row(name, accuracies(prompts, correct), list(losses), seconds, records)


def marked_picture(picture: np.ndarray, correct: bool) -> np.ndarray:
    """The picture, RGB, with a tick or a cross in its corner."""
    image = Image.fromarray(over(picture, checkerboard(*picture.shape[:2])))
    drawing = ImageDraw.Draw(image)
    left = image.width - 15
    drawing.rectangle((left - 2, 0, image.width, 15), fill="white")
    if correct:
        drawing.line((left, 8, left + 4, 12, left + 12, 2), fill=(0, 150, 60), width=2)
    else:
        drawing.line((left, 2, left + 11, 13), fill=(215, 20, 20), width=2)
        drawing.line((left, 13, left + 11, 2), fill=(215, 20, 20), width=2)
    return np.asarray(image)
