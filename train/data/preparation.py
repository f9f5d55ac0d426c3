"""Captioned pictures to the samples of a prepared set, chunk by chunk.

A chunk is a fixed number of consecutive records. Its bytes depend on these records and the settings
alone: pictures are encoded in batches of one bucket within a chunk, in the order of the records.
"""

import contextlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_snapgen.decode import Size, Unusable
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import TextEncoder
from mlx_snapgen.pictures import from_uint8
from train.data.imagefolder import fit, nearest_bucket
from train.data.pictures import open_picture
from train.data.readers.folder import NO_CAPTION
from train.data.selection import Filter
from train.data.shards import Sample
from train.data.source import Record, RecordSource, Skipped, describe_skipped
from train.data.text import padded_length

T = TypeVar("T")
R = TypeVar("R")

ENLARGED = "enlarged to the resolution"
"""In the report: pictures with a side below that of their bucket."""
AHEAD = 4
"""Pictures decoded ahead, for each worker."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, cropped to its bucket.

    Attributes:
        key, captions: of its record; "" where it has no caption of a column.
        original: its size before the crop.
        pixels: uint8 (H, W, 3), of a bucket's size.
        changed: what was changed besides, such as the color space; counted.
    """

    key: str
    captions: Mapping[str, str]
    original: Size
    pixels: np.ndarray
    changed: Sequence[str] = ()

    @property
    def size(self) -> Size:
        return self.pixels.shape[:2]


@dataclass(frozen=True)
class Rejected:
    """A picture that was decoded but not taken; `original` as in `Picture`."""

    skipped: Skipped
    original: Size


Item = Picture | Rejected | Skipped


@dataclass(frozen=True)
class Reader:
    """Reads and crops pictures; called in threads.

    Attributes:
        buckets: the sizes to crop to.
        filter: the records to use.
        columns: of the captions to keep; one without `named`.
        named: whether the user chose the columns; otherwise it is each record's first caption.
    """

    buckets: Sequence[Size]
    filter: Filter
    columns: Sequence[str]
    named: bool

    def __call__(self, record: Record) -> Item:
        """The picture of a record, or why it cannot be used."""
        weights = dict.fromkeys(self.columns, 1.0) if self.named else {}
        chosen = self.filter.with_captions(record, weights)
        if isinstance(chosen, Skipped):
            return chosen
        try:
            picture, changed = open_picture(chosen)
        except Unusable as error:
            return Skipped(record.key, error.reason, error.detail)
        size = picture.height, picture.width
        if skipped := self.filter.check_size(record.key, size):
            return Rejected(skipped, size)
        captions = dict(chosen.captions)
        if not self.named:
            captions = dict(zip(self.columns, captions.values(), strict=True))
        bucket = nearest_bucket(picture, self.buckets)
        if size[0] < bucket[0] or size[1] < bucket[1]:
            changed = [*changed, ENLARGED]
        return Picture(
            record.key,
            {column: captions.get(column, "") for column in self.columns},
            size,
            fit(picture, bucket),
            changed,
        )


class PictureSet:
    """The pictures of a source, decoded and encoded chunk by chunk.

    Args:
        decode: a record -> its picture, or why it cannot be used. Called in threads.
        encoder: of the pictures.
        chunk_size: records of a chunk.
        workers: threads that decode.

    Attributes:
        records: number of records in the source, known after all chunks.
    """

    def __init__(
        self,
        source: RecordSource,
        decode: Callable[[Record], Item],
        *,
        encoder: "Encoder",
        chunk_size: int,
        workers: int,
    ):
        self.source, self.decode, self.encoder = source, decode, encoder
        self.chunk_size, self.workers = chunk_size, workers
        self.autoencoder = encoder.autoencoder
        self.records: int | None = None
        self._counted: list[int | None] = []

    def count(self) -> int | None:
        """Number of records; None if it is not known."""
        if not self._counted:
            self._counted = [self.source.count()]
        return self._counted[0]

    def measure(self, chunk: int) -> "Measured":
        """Of one batch, the first, for any chunk.

        Raises:
            UserError: no picture can be used.
        """
        _, pictures = self._first()  # slower than the next
        samples = self.encoder.chunk(pictures).samples
        started = time.perf_counter()
        count, _ = self._first()
        decoding = (time.perf_counter() - started) / count / min(self.workers, os.cpu_count() or 1)
        # A full batch, as most are: there may be as many shapes as pictures here.
        batch = [pictures[0]] * self.encoder.batch_size
        self.encoder.encode(batch)  # what is compiled or loaded takes time once
        started = time.perf_counter()
        self.encoder.encode(batch)
        encoding = (time.perf_counter() - started) / len(batch)
        share = len(samples) / count
        return Measured(samples, decoding + share * encoding, share)

    def _first(self) -> tuple[int, list[Picture]]:
        """The number of records read for a batch, and the pictures of the batch."""
        pictures: list[Picture] = []
        reasons: Counter[str] = Counter()
        first: Skipped | None = None
        count = 0
        for record in self.source.records():
            count += 1
            item = record if isinstance(record, Skipped) else self.decode(record)
            if isinstance(item, Picture):
                pictures.append(item)
            else:
                skipped = item.skipped if isinstance(item, Rejected) else item
                reasons[skipped.reason] += 1
                first = first or skipped
            if len(pictures) == self.encoder.batch_size:
                break
        if not pictures:
            why = ", ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common(3))
            such = f", such as {describe_skipped(first)}" if first else ""
            hint = ""
            if not count and (folder := getattr(self.source, "folder", None)):
                ends = [end for end in ("tar", "parquet") if any(folder.glob(f"*.{end}"))]
                hint = ": give " + " ".join(f"'{folder}/*.{end}'" for end in ends) if ends else ""
            elif reasons[NO_CAPTION] == count:
                hint = (
                    ": put a .txt with a caption beside each picture, write a metadata.jsonl, or "
                    "give --caption-template"
                )
            raise UserError(f"no picture can be used ({why or 'there are none'}){such}{hint}")
        return count, pictures

    def pixels(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """The cropped pictures of these keys."""
        found: dict[str, np.ndarray] = {}
        for record in self.source.records():
            if len(found) == len(keys):
                break
            if record.key in keys and isinstance(record, Record):
                item = self.decode(record)
                if isinstance(item, Picture):
                    found[record.key] = item.pixels
        return found

    def chunks(
        self, wanted: Callable[[int], bool], *, start: int, progress: Callable[[int], Any]
    ) -> Iterator[tuple[int, "Chunk"]]:
        """(number, chunk) of each chunk that is wanted, from chunk `start`.

        Args:
            progress: called with the number of records that were just finished.
        """
        with contextlib.closing(
            in_order(self._numbered(wanted, start), self._decode, workers=self.workers)
        ) as items:
            for chunk, group in itertools.groupby(items, key=lambda pair: pair[0]):
                yield chunk, self.encoder.chunk((item for _, item in group), progress=progress)

    def _numbered(
        self, wanted: Callable[[int], bool], start: int
    ) -> Iterator[tuple[int, Record | Skipped]]:
        """(chunk, record) of the wanted chunks."""
        number = start * self.chunk_size
        take = False
        for record in self.source.records(number):
            chunk, place = divmod(number, self.chunk_size)
            if not place:
                take = wanted(chunk)
            number += 1
            if take:
                yield chunk, record
        self.records = number

    def _decode(self, pair: tuple[int, Record | Skipped]) -> tuple[int, Item]:
        chunk, record = pair
        return chunk, record if isinstance(record, Skipped) else self.decode(record)


def in_order(
    values: Iterable[T], function: Callable[[T], R], *, workers: int
) -> Generator[R, None, None]:
    """`map`, with the calls in threads and a few values ahead."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[R]] = deque()
    try:
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class CaptionEncoder:
    """Encodes captions for `Sample.states`.

    Attributes:
        name: of the text encoder.
        dims: D of its states.
        states: captions -> states (B, L, D) and mask (B, L).
        empty: both of the empty prompt, (1, ...).
    """

    name: str
    dims: int
    states: Callable[[Sequence[str]], tuple[mx.array, mx.array]]
    empty: Callable[[], tuple[mx.array, mx.array]]

    def __call__(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The states (L, D) of the tokens that count, as in `Sample`, of each caption."""
        return self._cut(*self.states(captions))

    def of_empty(self) -> np.ndarray:
        """The same of the empty prompt."""
        return self._cut(*self.empty())[0]

    def _cut(self, states: mx.array, mask: mx.array) -> list[np.ndarray]:
        kept = np.array(mask).astype(bool)
        # What an encoder computes for padding may be anything.
        states, what = mx.where(mask[..., None], states, 0), f"states of {self.name}"
        if states.dtype == mx.bfloat16:
            # Exact, also where float16 would overflow.
            check_finite(states, what)
            values = np.array(states.view(mx.uint16))
        else:
            values = half(states, what)
        return [row[keep] for row, keep in zip(values, kept, strict=True)]


@dataclass
class Encoder:
    """Decoded pictures -> samples.

    Attributes:
        autoencoder: of the model.
        texts: by name of a text encoder.
        others: name -> another autoencoder, whose latents are added.
        batch_size: pictures encoded at a time.
    """

    autoencoder: Autoencoder
    texts: Mapping[str, CaptionEncoder] = field(default_factory=dict)
    others: Mapping[str, Autoencoder] = field(default_factory=dict)
    batch_size: int = 8

    def chunk(
        self, items: Iterable[Item], *, progress: Callable[[int], Any] = lambda count: None
    ) -> "Chunk":
        """The samples of a chunk, in the order of its items; `UserError` if not finite."""
        chunk = Chunk()
        waiting: dict[Size, list[tuple[int, Picture]]] = {}
        samples: dict[int, Sample] = {}
        for number, item in enumerate(items):
            if isinstance(item, Skipped):
                chunk.skipped.append(item)
            elif isinstance(item, Rejected):
                chunk.skipped.append(item.skipped)
                chunk.sizes.append(item.original)
            else:
                chunk.sizes.append(item.original)
                chunk.changed.update(item.changed)
                batch = waiting.setdefault(item.size, [])
                batch.append((number, item))
                if len(batch) == self.batch_size:
                    samples |= self._encode(waiting.pop(item.size))
            progress(1)
        for size in sorted(waiting):
            samples |= self._encode(waiting[size])
        chunk.samples = [samples[number] for number in sorted(samples)]
        return chunk

    def _encode(self, numbered: Sequence[tuple[int, Picture]]) -> dict[int, Sample]:
        numbers, pictures = zip(*numbered, strict=True)
        return dict(zip(numbers, self.encode(pictures), strict=True))

    def encode(self, pictures: Sequence[Picture]) -> list[Sample]:
        """Samples of pictures of one size."""
        pixels = from_uint8(np.stack([picture.pixels for picture in pictures]))
        latents = half(self.autoencoder.encode(pixels), "latents")
        others = {
            name: half(other.encode(pixels), f"latents of the {name}")
            for name, other in self.others.items()
        }
        return make_samples(
            [picture.key for picture in pictures],
            [picture.captions for picture in pictures],
            latents=latents,
            others=others,
            size=pictures[0].size,
            texts=self.texts,
        )


@dataclass(frozen=True)
class Measured:
    """Of the first samples.

    Attributes:
        seconds: of a record, without what takes time only once.
        share: of the records that become samples.
    """

    samples: list[Sample]
    seconds: float
    share: float = 1.0

    @property
    def nbytes(self) -> float:
        """Of a record, on the disk."""
        return self.share * sum(sample.nbytes for sample in self.samples) / len(self.samples)


@dataclass
class Chunk:
    """What a shard gets."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    sizes: list[Size] = field(default_factory=list)


def make_samples(
    keys: Sequence[str],
    captions: Sequence[Mapping[str, str]],
    *,
    latents: np.ndarray,
    others: Mapping[str, np.ndarray],
    size: Size,
    texts: Mapping[str, CaptionEncoder],
) -> list[Sample]:
    """Samples of latents (B, h, w, C) of one size, with the text states of their captions."""
    states = {
        name: {column: encode([c[column] for c in captions]) for column in captions[0]}
        for name, encode in texts.items()
    }
    return [
        Sample(
            key,
            size,
            captions[i],
            latents[i],
            states={
                name: {column: rows[i] for column, rows in columns.items()}
                for name, columns in states.items()
            },
            other_latents={name: rows[i] for name, rows in others.items()},
        )
        for i, key in enumerate(keys)
    ]


def half(values: mx.array, what: str) -> np.ndarray:
    """Values in float16; `UserError` if they are not finite or too large for that."""
    found = values.astype(mx.float16)
    check_finite(found, what)
    return np.array(found)


def check_finite(values: mx.array, what: str) -> None:
    """`UserError` unless all values are finite."""
    if not mx.isfinite(values).all().item():
        raise UserError(f"the {what} are not finite in 16 bits: the model is damaged")


def of_encoder(encoder: TextEncoder, name: str, *, dims: int) -> CaptionEncoder:
    """A model's text encoder; its batches are padded to the longest caption only."""

    def states(captions: Sequence[str]) -> tuple[mx.array, mx.array]:
        tokens, mask = encoder.tokenize(captions)
        longest = int(np.array(mask).sum(1).max())
        length = padded_length(longest, tokens.shape[1])
        tokens, mask = tokens[:, :length], mask[:, :length]
        return encoder(tokens, mask), mask

    return CaptionEncoder(name, dims, states, lambda: states([""]))
