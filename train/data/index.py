"""Where the usable pictures of a set are: built once from their headers, stored in few arrays."""

import functools
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file
from mlx_snapgen.picture_files import Size, Unusable, header_size
from train.data.headers import quick_size
from train.data.imagefolder import nearest_size
from train.data.selection import LEAST_TO_HOLD_OUT, CaptionWeights, Filter, held_out
from train.data.source import Record, RecordSource, Skipped, describe_skipped

START, HEADER = 1 << 12, 1 << 16
"""Bytes of a file that are read first, and next; most have their size there."""
SAFE_PIXELS = 1 << 26
"""Pillow may refuse pictures with more."""
VERSION = 1


@dataclass(frozen=True)
class Index:
    """The usable pictures of a set, in its order.

    Attributes:
        places: JSON of `Record.place`, one after the other, uint8.
        ends: where each ends in `places`, int64 (N,).
        buckets: number of each picture's bucket, uint16 (N,).
        groups: `RecordSource.group` of each, uint32 (N,).
        held: whether each is for validation, bool (N,).
        skipped: reason -> number of records.
        digest: a hash of keys, sizes and captions.
    """

    places: np.ndarray
    ends: np.ndarray
    buckets: np.ndarray
    groups: np.ndarray
    held: np.ndarray
    skipped: Mapping[str, int]
    digest: str

    def place(self, row: int) -> tuple[Any, ...]:
        """`Record.place` of picture `row`."""
        start = int(self.ends[row - 1]) if row else 0
        return tuple(json.loads(self.places[start : int(self.ends[row])].tobytes()))


def picture_size(record: Record) -> Size:
    """The upright size of a record's picture, from its header; `Unusable` if there is none."""
    try:
        size = quick_size(record.read(START))
        if size is not None and size[0] * size[1] <= SAFE_PIXELS:
            return size
        start = record.read(HEADER)
        try:
            return header_size(start)
        except Unusable:
            if len(start) < HEADER:
                raise
            return header_size(record.read())
    except OSError as error:
        raise Unusable("file cannot be read", error.strerror or str(error)) from None


def select(
    record: Record | Skipped, filter: Filter, *, captions: CaptionWeights
) -> tuple[Record, Size] | Skipped:
    """A record with the captions to choose from and its picture's size, or why it is not used."""
    if isinstance(record, Record):
        record = filter.with_captions(record, captions)
    if isinstance(record, Skipped):
        return record
    try:
        size = picture_size(record)
    except Unusable as error:
        return Skipped(record.key, error.reason, error.detail)
    return filter.check_size(record.key, size) or (record, size)


def build_index(
    source: RecordSource,
    buckets: Sequence[Size],
    *,
    filter: Filter,
    captions: CaptionWeights,
    share: float,
) -> Index:
    """The index of a set; shows a bar.

    Args:
        buckets: the sizes to crop to.
        captions: columns to choose from.
        share: of the pictures, for validation.

    Raises:
        UserError: no usable picture.
    """
    numbers = {size: number for number, size in enumerate(buckets)}
    # Many pictures have the same size.
    nearest = functools.lru_cache(1 << 12)(lambda size: numbers[nearest_size(size, buckets)])
    places, ends = bytearray(), []
    chosen, groups, held = np.zeros(0, np.uint16), np.zeros(0, np.uint32), np.zeros(0, bool)
    rows: list[tuple[int, int, bool]] = []
    skipped: Counter[str] = Counter()
    first: Skipped | None = None
    state = hashlib.blake2b(digest_size=8)

    def flush() -> None:
        nonlocal chosen, groups, held
        columns = [np.array(column) for column in zip(*rows, strict=True)] or [[], [], []]
        chosen = np.concatenate([chosen, columns[0]]).astype(np.uint16)
        groups = np.concatenate([groups, columns[1]]).astype(np.uint32)
        held = np.concatenate([held, columns[2]]).astype(bool)
        rows.clear()

    for found in tqdm(source.records(), desc="reading headers", unit="picture", leave=False):
        selected = select(found, filter, captions=captions)
        if isinstance(selected, Skipped):
            skipped[selected.reason] += 1
            first = first or selected
            continue
        record, size = selected
        line = json.dumps([record.key, size, dict(record.captions)])
        state.update(line.encode())
        places += json.dumps(record.place).encode()
        ends.append(len(places))
        rows.append((nearest(size), source.group(record.place), held_out(record.key, share)))
        if len(rows) == 1 << 16:
            flush()
    flush()
    if not ends:
        text = f": {skipped.total()} skipped, such as {describe_skipped(first)}" if first else ""
        what = "usable picture" if filter.pictures_only else "picture with a caption"
        raise UserError(f"no {what} in {paths_of(source)}{text}")
    if len(ends) < LEAST_TO_HOLD_OUT or held.all():
        held[:] = False
    return Index(
        np.frombuffer(bytes(places), np.uint8),
        np.array(ends, np.int64),
        chosen,
        groups,
        held,
        dict(skipped),
        state.hexdigest(),
    )


def paths_of(source: RecordSource) -> str:
    """The files or the folder of a source, for messages."""
    paths = source.settings()["path"]
    return paths if isinstance(paths, str) else ", ".join(paths)


def cached_index(
    source: RecordSource,
    buckets: Sequence[Size],
    *,
    filter: Filter,
    captions: CaptionWeights,
    share: float,
    folder: Path | None,
) -> Index:
    """`build_index`, or what it gave before for the same files and settings, kept in `folder`."""
    if folder is None:
        return build_index(source, buckets, filter=filter, captions=captions, share=share)
    what = [VERSION, source.settings(), source.fingerprint(), list(buckets), filter.settings()]
    text = json.dumps([*what, list(captions), share])
    path = folder / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.npz"
    if path.is_file():
        try:
            with np.load(path) as arrays:
                stored = dict(arrays)
            words = json.loads(stored.pop("words").tobytes())
            return Index(**stored, **words)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            pass  # a damaged file is written again
    index = build_index(source, buckets, filter=filter, captions=captions, share=share)
    words = json.dumps({"skipped": index.skipped, "digest": index.digest}).encode()
    stored = {k: v for k, v in vars(index).items() if isinstance(v, np.ndarray)}
    try:
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, words=np.frombuffer(words, np.uint8), **stored)  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return index
