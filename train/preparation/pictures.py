"""The captioned pictures of a source, read, decoded and encoded chunk by chunk.

A chunk is a fixed number of consecutive records. Its bytes depend on these records and the settings
alone: pictures are encoded in batches of one bucket within a chunk, in the order of the records.
"""

import contextlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size, Unusable
from train.data.imagefolder import fit, nearest_bucket
from train.data.pictures import open_picture
from train.data.readers.folder import NO_CAPTION
from train.data.selection import Filter
from train.data.source import Record, RecordSource, Skipped, describe_skipped
from train.preparation.encoders import Chunk, Encoder, Item, Measured, Picture, Rejected

T = TypeVar("T")
R = TypeVar("R")

ENLARGED = "enlarged to the resolution"
"""In the report: pictures with a side below that of their bucket."""
AHEAD = 4
"""Pictures decoded ahead, for each worker."""


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
        encoder: Encoder,
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

    def measure(self, chunk: int) -> Measured:
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
    ) -> Iterator[tuple[int, Chunk]]:
        """See `Work`."""
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
