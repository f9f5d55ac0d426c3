"""Pictures of a set of records, read and decoded during training."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size, Unusable, decode
from train.data.imagefolder import fit
from train.data.index import Index, cached_index, paths_of
from train.data.order import BatchOrder, LocalOrder, fixed_rows
from train.data.readers.joined import JoinedRecords
from train.data.selection import HELD_OUT, CaptionWeights, Filter, choose_column, fixed_draw
from train.data.source import PictureSource, Record, RecordSource, Skipped, shares_of
from train.data.streams import Stream

T = TypeVar("T")

MOST_DAMAGED = 100
"""Pictures of a bucket that may be damaged one after the other."""


def open_picture(record: Record) -> tuple[Image.Image, list[str]]:
    """`decode` of a record's picture; `Unusable` also if its file cannot be read."""
    try:
        return decode(record.read())
    except OSError as error:
        raise Unusable("file cannot be read", error.strerror or str(error)) from None


def _stacked(group: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    pictures, captions = zip(*group, strict=True)
    return np.stack(pictures), list(captions)


class RecordPictures(PictureSource):
    """The pictures of a `RecordSource`, cropped to buckets.

    The set is indexed first: headers and captions are read, not the pictures. A picture that turns
    out to be damaged later is replaced by the next one of its bucket, which is reported.

    Args:
        source: read in any order.
        buckets: the sizes to crop to; each picture gets the one nearest in shape.
        filter: the records to use.
        captions: columns to choose from, with weights.
        seed: of the order of pictures and the choice of captions.
        share: of the pictures, kept for validation; none of a small set.
        folder: where the index is kept for the next start, or None.

    Raises:
        UserError: no usable picture, or the set can only be read in order.
    """

    def __init__(
        self,
        source: RecordSource,
        buckets: Sequence[Size],
        *,
        filter: Filter | None = None,
        captions: CaptionWeights | None = None,
        seed: int = 0,
        share: float = HELD_OUT,
        folder: Path | None = None,
    ):
        self.source, self.sizes, self.seed = source, list(buckets), seed
        self.filter, self.captions = filter or Filter(), dict(captions or {})
        self.index = cached_index(
            source,
            buckets,
            filter=self.filter,
            captions=self.captions,
            share=share,
            folder=folder,
        )
        self._use(self.index, validation=False)

    def _use(self, index: Index, *, validation: bool) -> None:
        """Use the part of the pictures for validation, or the other."""
        part = index.held == validation
        numbers = range(len(self.sizes))
        self.rows = [np.flatnonzero(part & (index.buckets == b)) for b in numbers]
        self.all_rows = np.flatnonzero(part)
        self.is_validation = validation
        cached = functools.lru_cache(maxsize=4)
        self._order = cached(lambda count: self._order_of(self.rows, count))
        self._prompt_order = cached(lambda count: self._order_of([self.all_rows], count))
        self._reported: set[int] = set()

    @property
    def num_samples(self) -> int:
        """Number of pictures."""
        return len(self.all_rows)

    @property
    def size_shares(self) -> dict[Size, float]:
        """See `Source`."""
        return shares_of(self.sizes, map(len, self.rows))

    def validation(self) -> "RecordPictures | None":
        """The pictures kept for validation; None if there are none."""
        if self.is_validation or not self.index.held.any():
            return None
        other = object.__new__(RecordPictures)
        other.__dict__.update(self.__dict__)
        other._use(self.index, validation=True)
        return other

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`; all pictures of a batch are of one bucket. From any thread."""
        bucket, places = self._order(count)(number)
        size, rows = self.sizes[bucket], self.rows[bucket]

        def sample(row: int, draw: float) -> tuple[np.ndarray, str]:
            record = self._record(row)
            return fit(open_picture(record)[0], size), self._caption(record, draw)

        return _stacked(self._each(sample, rows, places, number=number))

    def batches(
        self, count: int, *, most: int | None = None
    ) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See `Prepared.batches`; pictures and captions as in `batch`. Damaged ones are left out.

        They are read in the order of the set.
        """
        waiting: dict[int, list[tuple[np.ndarray, str]]] = {}
        for row in self.all_rows[fixed_rows(self.num_samples, most)].tolist():
            bucket = int(self.index.buckets[row])
            try:
                record = self._record(row)
                pixels = fit(open_picture(record)[0], self.sizes[bucket])
            except Unusable as error:
                self._report(row, error, replaced=False)
                continue
            group = waiting.setdefault(bucket, [])
            group.append((pixels, self._caption(record, fixed_draw(record.key))))
            if len(group) == count:
                yield _stacked(waiting.pop(bucket))
        for bucket in sorted(waiting):
            yield _stacked(waiting[bucket])

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`: captions, in an order of their own."""
        rows = self.all_rows
        _, places = self._prompt_order(count)(number)

        def caption(row: int, draw: float) -> str:
            return self._caption(self._record(row, captions_only=True), draw)

        return self._each(caption, rows, places, number=number)

    @property
    def columns(self) -> list[str]:
        """The columns of captions of the first picture, the default one first."""
        record = self.source.at(self.index.place(0), captions_only=True)
        return list(record.captions) if isinstance(record, Record) else []

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "data": "pictures",
            "samples": self.index.digest,
            "buckets": [list(size) for size in self.sizes],
            "captions": self.captions,
            "seed": self.seed,
            "where": {**self.source.settings(), "filter": self.filter.settings()},
        }

    def _order_of(self, buckets: Sequence[np.ndarray], count: int) -> BatchOrder | LocalOrder:
        """The order of batches of `count` of the rows of some buckets."""
        if not self.index.groups.any():
            return BatchOrder(list(map(len, buckets)), batch_size=count, seed=self.seed)
        groups = [self.index.groups[rows] for rows in buckets]
        parts = int(self.index.groups.max()) + 1
        table = np.stack([np.bincount(group, minlength=parts) for group in groups], axis=1)
        return LocalOrder(table, batch_size=count, seed=self.seed)

    def _each(
        self, read: Callable[[int, float], T], rows: np.ndarray, places: np.ndarray, *, number: int
    ) -> list[T]:
        """What `read` gives for the rows at these places, or for the usable ones after them."""
        draws = Stream.CAPTIONS.generator(self.seed, number).random(len(places))
        found: list[T] = []
        for place, draw in zip(places.tolist(), draws.tolist(), strict=True):
            for k in range(MOST_DAMAGED):
                row = int(rows[(place + k) % len(rows)])
                try:
                    found.append(read(row, draw))
                    break
                except Unusable as error:
                    self._report(row, error)
            else:
                raise UserError(
                    f"{paths_of(self.source)}: {MOST_DAMAGED} pictures in a row cannot be "
                    "read; were files deleted or changed?"
                )
        return found

    def _record(self, row: int, *, captions_only: bool = False) -> Record:
        record = self.source.at(self.index.place(row), captions_only=captions_only)
        if isinstance(record, Record):
            record = self.filter.with_captions(record, self.captions)
        if isinstance(record, Skipped):
            raise Unusable(record.reason, record.detail)
        return record

    def _caption(self, record: Record, draw: float) -> str:
        if not record.captions:
            return ""
        return record.captions[choose_column(record.captions, self.captions, draw=draw)]

    def _report(self, row: int, error: Unusable, *, replaced: bool = True) -> None:
        """Print a line on a picture that cannot be used, once."""
        if row not in self._reported:
            self._reported.add(row)
            instead = "; another picture is used instead" if replaced else ""
            tqdm.write(f"skipped: {self._name(row)}: {error}{instead}", file=sys.stderr)

    def _name(self, row: int) -> str:
        """What messages call a picture."""
        source, place = self.source, self.index.place(row)
        if isinstance(source, JoinedRecords):
            source, place = source.sources[place[0]], place[1:]
        key, path = source.at(place, captions_only=True).key, source.settings()["path"]
        return f"{path}/{key}" if isinstance(path, str) else key
