"""Interfaces of sources of training data. Each source is a module in this folder.

A `RecordSource` reads the pictures of a set one after the other, in the order of its files. The
other sources give batches, which depend only on the arguments and the source's seed, so that a
resumed run gets the same data as an uninterrupted one. To add a source, write a class with these
methods (`imagefolder` is an example), and choose it in a command at the top of `train/`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

Batch = dict[str, mx.array]


class PictureSource(Protocol):
    """Pictures with captions."""

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """Batch `number` of `count` samples: pictures of one size and their captions.

        Returns:
            pictures: uint8 (count, H, W, 3), RGB.
            captions: list of `count` strings.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Settings to record in the run's folder, as JSON values; "data" is the source's kind."""
        ...


class PromptSource(Protocol):
    """Prompts without pictures."""

    def prompts(self, number: int, count: int) -> list[str]:
        """Batch `number` of `count` prompts."""
        ...


@dataclass(frozen=True)
class Record:
    """A captioned picture of a set, not decoded yet.

    Attributes:
        key: unique in its set, the same in every run, such as a path relative to a folder.
        captions: name of a column -> caption.
        read: the contents of the picture's file.
    """

    key: str
    captions: Mapping[str, str]
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Skipped:
    """A part of a set that cannot be used.

    Attributes:
        key: as in `Record`.
        reason: one of few short texts, such as "no caption"; counted.
        detail: what exactly is wrong.
    """

    key: str
    reason: str
    detail: str = ""


class RecordSource(Protocol):
    """A set of captioned pictures, read in order; memory does not grow with the set."""

    def count(self) -> int | None:
        """Number of records, skipped ones included; None if that takes a pass over the data."""
        ...

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """The records from number `start`, skipped ones counted."""
        ...

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        ...


@dataclass
class Samples:
    """A batch of encoded pictures of one size.

    Attributes:
        latents: normalized latents (B, h, w, C).
        captions: of the pictures, (B,).
        states: name of a frozen text encoder, such as "text_encoder_1" or "teacher" -> its states
            of each caption, (L, D) without padding. Empty if they are computed during training.
        other_latents: latents of the same pictures by another autoencoder, such as "teacher".
    """

    latents: mx.array
    captions: list[str]
    states: dict[str, list[np.ndarray]] = field(default_factory=dict)
    other_latents: dict[str, mx.array] = field(default_factory=dict)


class LatentSource(Protocol):
    """Batches of encoded pictures."""

    def samples(self, number: int, count: int) -> Samples:
        """Batch `number` of `count` samples."""
        ...

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        ...
