"""Interfaces of sources of training data. Each source is a module in this folder.

A `RecordSource` reads the pictures of a set one after the other, in the order of its files. The
other sources give batches, which depend only on the arguments and the source's seed, so that a
resumed run gets the same data as an uninterrupted one. To add a source, write a class that inherits
`PictureSource` and open it in `open.py`. A set of pictures in another format is a `RecordSource` in
`readers/`.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_snapgen.picture_files import Size

Batch = dict[str, mx.array]


class PromptSource(Protocol):
    """Prompts, with pictures or without."""

    def prompts(self, number: int, count: int) -> list[str]:
        """Batch `number` of `count` prompts, in an order of their own."""
        ...


class Source(PromptSource, Protocol):
    """Captioned pictures, or what they were encoded to; with defaults for classes that inherit."""

    @property
    def num_samples(self) -> int | None:
        """Number of pictures; None if the source has no end."""
        return None

    @property
    def channels(self) -> int:
        """Channels of the pictures: 3, or 4 with alpha."""
        return 3

    @property
    def size_shares(self) -> dict[Size, float]:
        """Size -> its share of the batches, see `shares_of`; empty if there is but one, unnamed."""
        return {}

    @property
    def sources(self) -> Sequence[Any]:
        """The sources that a `Mixture` draws from; the source itself if it is none."""
        return [self]

    def validation(self) -> "Source | None":
        """The pictures kept for validation; None if there are none."""
        return None

    def settings(self) -> dict[str, Any]:
        """Settings to record in the run's folder, as JSON values; "data" is the source's kind."""
        ...


def shares_of(sizes: Iterable[Size], counts: Iterable[float]) -> dict[Size, float]:
    """Size -> its share of all pictures, the most frequent first; those without are left out."""
    found = Counter(dict(zip(sizes, counts, strict=True))).most_common()
    total = sum(count for _, count in found)
    return {size: count / total for size, count in found if count}


class PictureSource(Source, Protocol):
    """Pictures with captions."""

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """Batch `number` of `count` samples: pictures of one size and their captions.

        Returns:
            pictures: uint8 (count, H, W, `channels`), RGB or RGBA.
            captions: list of `count` strings.
        """
        ...

    def batches(
        self, count: int, *, most: int | None = None
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Each picture once, at most `count` at a time; of a source without end from the beginning.

        Args:
            most: limit of the pictures.
        """
        numbers = itertools.count() if most is None else range(-(-most // count))
        for number in numbers:
            pictures, captions = self.batch(number, count)
            rest = count if most is None else min(count, most - number * count)
            yield pictures[:rest], captions[:rest]

    def prompts(self, number: int, count: int) -> list[str]:
        """The captions of `batch`."""
        return self.batch(number, count)[1]


class CodedSource(Source, Protocol):
    """Captions, and what is where in their pictures."""

    @property
    def num_things(self) -> int:
        """How many things they show; these have the first codes."""
        ...

    def semantics(self, number: int, count: int, *, factor: int) -> np.ndarray:
        """What is where in the pictures of batch `number`.

        Args:
            factor: side of a picture, divided by that of its latents.

        Returns:
            float32 (count, H / factor, W / factor, `SEEN_CHANNELS`).
        """
        ...


class SemanticSource(CodedSource, PictureSource, Protocol):
    """Pictures of which is known what is where in them."""


MAY_CHANGE = ("where", "num_nouns", "categories")
"""Settings of sources that may differ when a run is resumed. The same files may have moved, and the
scenes of the stickers may change; anything else that changes samples makes another run."""


@dataclass(frozen=True)
class Record:
    """A captioned picture of a set, not decoded yet.

    Attributes:
        key: unique in its set, the same in every run, such as a path relative to a folder.
        captions: name of a column -> caption.
        read: the contents of the picture's file, or with a number at most so many of its first
            bytes; `OSError` if it cannot be read.
        place: where the record is, as JSON values for `RecordSource.at`.
    """

    key: str
    captions: Mapping[str, str]
    read: Callable[..., bytes]
    place: tuple[Any, ...] = ()


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


def describe_skipped(skipped: Skipped) -> str:
    """A line for messages."""
    detail = f" ({skipped.detail})" if skipped.detail else ""
    return f"{skipped.key}: {skipped.reason}{detail}"


class RecordSource(Protocol):
    """A set of captioned pictures, read in order; memory does not grow with the set.

    The first of a record's captions is used if no column is chosen.
    """

    def count(self) -> int | None:
        """Number of records, skipped ones included; None if that takes a pass over the data."""
        ...

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """The records from number `start`, skipped ones counted."""
        ...

    def at(self, place: Sequence[Any], *, captions_only: bool = False) -> Record | Skipped:
        """The record at a place, in any order and from any thread.

        Args:
            captions_only: the caller does not read the picture, so that it need not be there.

        Raises:
            UserError: the set can only be read in order.
        """
        ...

    def group(self, place: Sequence[Any]) -> int:
        """Number of the part of the set that is read at once; ascending in the set's order."""
        ...

    def fingerprint(self, *, times: bool = True) -> str:
        """A hash of the names, sizes and times of the set's files.

        Args:
            times: if false, files of the same relative names and sizes have the same hash, also in
                another folder or on another machine.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        ...


TEACHER = "teacher"
"""Name of a teacher's text states and latents in `Samples`."""


@dataclass
class Samples:
    """A batch of encoded pictures of one size.

    Attributes:
        latents: normalized latents (B, h, w, C); a numpy array from `Prepared.read`.
        captions: of the pictures, (B,).
        states: name of a frozen text encoder, such as "text_encoder_1" or "teacher" -> its states
            of each caption, (L, D) without padding. Empty if they are computed during training.
        other_latents: latents of the same pictures by another autoencoder, such as "teacher".
    """

    latents: mx.array
    captions: list[str]
    states: dict[str, list[np.ndarray]] = field(default_factory=dict)
    other_latents: dict[str, mx.array] = field(default_factory=dict)

    def to_mlx(self) -> "Samples":
        """With MLX arrays in place of numpy arrays."""
        others = {name: mx.array(latents) for name, latents in self.other_latents.items()}
        return replace(self, latents=mx.array(self.latents), other_latents=others)


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of pictures of one size.

    Attributes:
        states: see `Samples`.
    """

    prompts: list[str]
    size: Size
    states: dict[str, list[np.ndarray]] = field(default_factory=dict)


class LatentSource(Protocol):
    """Batches of encoded pictures."""

    def samples(self, number: int, count: int) -> Samples:
        """Batch `number` of `count` samples."""
        ...
