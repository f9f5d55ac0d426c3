"""Which records of a set are used, for training or for validation, and with which captions."""

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.picture_files import Size
from train.data.source import Record, Skipped

HELD_OUT = 0.01
"""Share of a set that is kept for validation."""
LEAST_TO_HOLD_OUT = 100
"""A set with fewer pictures has no part for validation."""

CaptionWeights = Mapping[str, float]
"""Column -> its weight; empty for the first column of each record."""


def held_out(key: str, share: float) -> bool:
    """Whether the record with this key is for validation: for about this share of all keys."""
    digest = hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest()
    value = int.from_bytes(digest, "big")
    return value < share * 2**64


def fixed_draw(key: str) -> float:
    """The number in [0, 1) for `choose_column` where the choice must be the same in every run."""
    data = key.encode(errors="surrogateescape")
    # Another hash than that of `held_out`, which is small for all keys that are held out.
    digest = hashlib.blake2b(data, digest_size=8, person=b"caption").digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Filter:
    """The records to use; each of the others has one reason.

    Attributes:
        min_side: of a picture's shorter side, in pixels.
        max_aspect: of the longer side to the shorter one.
        min_caption, max_caption: in characters; None for no limit.
        pictures_only: a picture needs no caption.
    """

    min_side: int = 1
    max_aspect: float = 4.0
    min_caption: int = 1
    max_caption: int | None = None
    pictures_only: bool = False

    def with_captions(self, record: Record, weights: CaptionWeights) -> Record | Skipped:
        """The record with the captions to choose from, without the others."""
        names = list(weights) or list(record.captions)[:1]
        found = {name: text for name in names if (text := record.captions.get(name))}
        if not found and not self.pictures_only:
            there = [name for name, text in record.captions.items() if text]
            hint = nearest(names[0], there) if names else ""
            text = (
                f"no {', '.join(names)}{hint}; it has: {', '.join(there)}; choose with --captions"
            )
            return Skipped(record.key, "no caption", text if there else "")
        long = {name: text for name, text in found.items() if len(text) >= self.min_caption}
        fitting = {k: v for k, v in long.items() if len(v) <= (self.max_caption or len(v))}
        if not fitting and not self.pictures_only:
            return Skipped(record.key, "caption too long" if long else "caption too short")
        return replace(record, captions=fitting)

    def check_size(self, key: str, size: Size) -> Skipped | None:
        """The reason not to use a picture of this size."""
        text = f"{size[1]} x {size[0]} pixels"
        if min(size) < self.min_side:
            return Skipped(key, f"a side below {self.min_side} pixels", text)
        if max(size) > self.max_aspect * min(size):
            return Skipped(key, f"aspect ratio above {self.max_aspect:g}", text)
        return None

    def settings(self) -> dict[str, Any]:
        """JSON values, to record."""
        # Earlier versions recorded only the others.
        return {k: v for k, v in asdict(self).items() if k != "pictures_only" or v}


def parse_captions(columns: Sequence[str]) -> dict[str, float]:
    """`COLUMN` and `COLUMN=WEIGHT`, as in `--captions` -> weights, 1 where none is given.

    Raises:
        UserError: a weight that is not above 0, or a column twice.
    """
    weights: dict[str, float] = {}
    for text in columns:
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise UserError(f"--captions {text}: give COLUMN or COLUMN=WEIGHT, a number above 0")
        name = name if equals else number
        if name in weights:
            raise UserError(f"--captions: {name} is there twice")
        weights[name] = weight
    return weights


def choose_column(texts: Mapping[str, str], weights: CaptionWeights, *, draw: float) -> str:
    """One of the columns with a text, by weight; `draw` is a random number in [0, 1)."""
    names = [name for name in weights if texts.get(name)]
    if not names:
        return next(iter(texts))
    ends = np.cumsum([weights[name] for name in names])
    return names[min(bisect.bisect_right(ends, draw * ends[-1]), len(names) - 1)]
