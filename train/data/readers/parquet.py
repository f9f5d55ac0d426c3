"""Parquet files as of Hugging Face: a column of pictures, {bytes, path} or bytes, and texts."""

import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.reading import check_regular
from train.data.readers.captions import by_preference, one_line
from train.data.readers.tars import file_hash, short_names
from train.data.source import Record, Skipped

PICTURES = ("image", "img", "picture", "jpg", "png", "webp")
"""Names of the column of pictures, in order of preference; otherwise the only one."""
ROWS = 16
"""Rows read at a time, in order."""
PART = 2**24
"""Bytes of row groups that training visits together."""
KEPT = 2**25
"""Bytes of row groups kept in memory for training, or two of them."""
NOT_READ = b"not read"
"""In place of a picture of which only the captions were read."""
UNREADABLE = (OSError, UnicodeDecodeError, pa.ArrowException)
"""Of a damaged file; names that are not UTF-8 are no error of Arrow."""
LARGEST = 2**30
"""Bytes of a row group that is read at once."""


class ParquetRecords:
    """The rows of parquet files: a `RecordSource`. Keys are "FILE:ROW".

    A text column with several texts in each row becomes columns NAME, NAME.2, and so on.
    A record's place is (number of the file, row group, row in it).

    Args:
        paths: files, in this order, all with the same columns.
        columns: of texts, to read; none for all.
        pictures_only: also give the pictures that have no caption, or none that can be read.

    Raises:
        UserError: the first file has no such columns.
    """

    def __init__(
        self, paths: Sequence[Path], *, columns: Sequence[str] = (), pictures_only: bool = False
    ):
        self.paths, self.columns, self.pictures_only = list(paths), list(columns), pictures_only
        self.names = short_names(self.paths)
        self._tables: OrderedDict[tuple[int, int, bool], Any] = OrderedDict()
        self._lock = threading.Lock()
        with _open(self.paths[0]) as file:
            self._columns(self.paths[0], file)

    def count(self) -> int:
        """See `RecordSource`."""
        total = 0
        for path in self.paths:
            with _open(path) as file:
                total += file.metadata.num_rows
        return total

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """See `RecordSource`; row group by row group."""
        for number, path in enumerate(self.paths):
            with _open(path) as file:
                if start >= file.metadata.num_rows:
                    start -= file.metadata.num_rows
                    continue
                first = 0
                columns = self._columns(path, file)
                for group in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if start >= rows:
                        start -= rows
                    else:
                        found = self._group(number, file, group, first=first, columns=columns)
                        yield from itertools.islice(found, start, None)
                        start = 0
                    first += rows

    def at(self, place: Sequence[Any], *, captions_only: bool = False) -> Record | Skipped:
        """See `RecordSource`; the last row groups stay in memory."""
        number, group, row = place
        table, first, columns = self._table(number, group, captions_only)
        read = columns[captions_only:]
        values = _values(table, row, columns=read, pictures_only=self.pictures_only)
        if values is not None and captions_only:
            values[columns[0]] = NOT_READ
        return self._record(tuple(place), first + row, values, columns=columns)

    def group(self, place: Sequence[Any]) -> int:
        """See `RecordSource`."""
        return int(self._layout[place[0]][0][place[1]])

    def fingerprint(self, *, times: bool = True) -> str:
        """See `RecordSource`."""
        return file_hash(self.paths, times=times)

    def settings(self) -> dict[str, Any]:
        """See `RecordSource`."""
        paths = [str(path) for path in self.paths]
        return {"data": "parquet", "path": paths, "columns": self.columns}

    def _columns(self, path: Path, file: Any) -> list[str]:
        """Names of the column of pictures and those of texts, the main one first."""
        schema = file.schema_arrow
        there = ", ".join(schema.names)
        pictures = [field.name for field in schema if _has_pictures(field.type)]
        named = [name for name in PICTURES if name in pictures]
        if not pictures:
            raise UserError(f"{path} has no column of pictures; its columns: {there}")
        if not named and len(pictures) > 1:
            raise UserError(
                f"{path} has several columns of bytes ({', '.join(pictures)}): name the one of "
                f"pictures {PICTURES[0]}"
            )
        texts = [field.name for field in schema if _has_texts(field.type)]
        for name in self.columns:
            if _base(name, texts) not in texts:
                raise UserError(
                    f"{path} has no column {name}{nearest(name, texts)}; its columns: {there}"
                )
        if not texts and not self.pictures_only:
            raise UserError(f"{path} has no column of texts; its columns: {there}")
        chosen = list(dict.fromkeys(_base(name, texts) for name in self.columns))
        return [(named or pictures)[0], *(chosen or by_preference(texts))]

    def _group(
        self, number: int, file: Any, group: int, *, first: int, columns: list[str]
    ) -> Iterator[Record | Skipped]:
        row = 0
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                for k in range(batch.num_rows):
                    values = _values(batch, k, columns=columns, pictures_only=self.pictures_only)
                    place = (number, group, row)
                    yield self._record(place, first + row, values, columns=columns)
                    row += 1
        except UNREADABLE as error:
            why = " ".join(str(error).split())
            # The rows keep their numbers.
            rows = file.metadata.row_group(group).num_rows
            for lost in range(row, rows):
                key = f"{self.names[number]}:{first + lost}"
                yield Skipped(key, "damaged row group", why)

    def _record(
        self,
        place: tuple[int, int, int],
        row: int,
        values: Mapping[str, Any] | None,
        *,
        columns: Sequence[str],
    ) -> Record | Skipped:
        key = f"{self.names[place[0]]}:{row}"
        picture, *texts = columns
        if values is None:
            return Skipped(key, "caption not in UTF-8", f"row {row} is not readable as UTF-8")
        data = values[picture]
        if isinstance(data, Mapping):
            path, data = data.get("path"), data.get("bytes")
            if data is None and path:
                return Skipped(key, "picture not in the file", f"only its path {path}")
        if not data:
            return Skipped(key, "no picture")
        captions: dict[str, str] = {}
        for name in texts:
            value = values[name]
            several = value if isinstance(value, list) else [value]
            for k, text in enumerate(several, 1):
                captions[name if k == 1 else f"{name}.{k}"] = one_line(text or "")
        if not any(captions.values()) and not self.pictures_only:
            return Skipped(key, "empty caption")

        def read(most: int = -1) -> bytes:
            return data if most < 0 else data[:most]

        return Record(key, captions, read, place)

    def _table(self, number: int, group: int, captions_only: bool) -> tuple[Any, int, list[str]]:
        """A row group, the number of its first row in the file, and the names of its columns."""
        key = number, group, captions_only
        with self._lock:
            if key not in self._tables:
                self._tables[key] = self._read(*key)
                while len(self._tables) > 2 and self._kept() > KEPT:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(key)
            return self._tables[key]

    def _kept(self) -> int:
        return sum(table.nbytes for table, _, _ in self._tables.values())

    def _read(self, number: int, group: int, captions_only: bool) -> tuple[Any, int, list[str]]:
        path = self.paths[number]
        with _open(path) as file:
            columns = self._columns(path, file)
            size = file.metadata.row_group(group).total_byte_size
            if size > LARGEST and not captions_only:
                raise UserError(
                    f"{path} has row groups of {size / 1e9:.1f} GB, too large to read in random "
                    "order: encode it first with python -m train.prepare"
                )
            try:
                table = file.read_row_group(group, columns=columns[captions_only:])
            except UNREADABLE as error:
                why = " ".join(str(error).split())
                raise UserError(f"{path} is damaged: {why}") from None
            return table, int(self._layout[number][1][group]), columns

    @functools.cached_property
    def _layout(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each file's row groups: their parts, from 1, and the numbers of their first rows.

        A part has neighboring row groups of about `PART` bytes.
        """
        layout, part, filled = [], 1, 0
        for path in self.paths:
            parts, firsts, first = [], [], 0
            with _open(path) as file:
                for k in range(file.metadata.num_row_groups):
                    group = file.metadata.row_group(k)
                    if filled and filled + group.total_byte_size > PART:
                        part, filled = part + 1, 0
                    filled += group.total_byte_size
                    parts.append(part)
                    firsts.append(first)
                    first += group.num_rows
            layout.append((np.array(parts, np.uint32), np.array(firsts, np.int64)))
        return layout


def _values(
    table: Any, row: int, *, columns: Sequence[str], pictures_only: bool
) -> dict[str, Any] | None:
    """The cells of a row; None if a text is not UTF-8, which is None instead if `pictures_only`."""
    found: dict[str, Any] = {}
    for name in columns:
        try:
            found[name] = table.column(name)[row].as_py()
        except UnicodeDecodeError:
            if not pictures_only:
                return None
            found[name] = None
    return found


def _base(name: str, texts: Sequence[str]) -> str:
    """The column of "NAME.2" in the file."""
    base, dot, number = name.rpartition(".")
    return base if name not in texts and dot and number.isdecimal() else name


def _has_pictures(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        names = [kind.field(k).name for k in range(kind.num_fields)]
        return "bytes" in names and _has_pictures(kind.field(names.index("bytes")).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_texts(kind: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _open(path: Path) -> Any:
    """A parquet file; `UserError` if it cannot be read."""
    try:
        check_regular(path)
        return pq.ParquetFile(path, pre_buffer=False)
    except UNREADABLE as error:
        why = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as parquet: {why}") from None
