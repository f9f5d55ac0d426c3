"""A folder of pictures, with subfolders.

Captions come from `metadata.jsonl` files (lines of `file_name`, relative to the file's folder,
`text` or `caption`, and any further texts; without these two the first text of the file's first
line is the main one), in folders without one from `metadata.csv` files with these columns, from a
`.txt` beside a picture, or else from the name of the picture's folder and a template, as for
ImageNet.
"""

import csv
import functools
import hashlib
import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.picture_files import MAX_BYTES
from mlx_snapgen.reading import MOST_LINE, check_size, open_regular, read_lines
from mlx_snapgen.reading import decode_text as decode
from train.data.readers.captions import (
    decode_text,
    default_column,
    one_line,
    parse_object,
    text_columns,
)
from train.data.source import Record, Skipped

METADATA, TABLE = "metadata.jsonl", "metadata.csv"
NAME = "file_name"
MOST_COLUMNS = 8
"""Columns in a line."""
# Pillow cannot read all of these: those that it cannot read are reported, not ignored.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".heic", ".heif", ".avif", ".jp2", ".j2k", ".tga", ".ppm", ".pgm", ".jxl"),
)

NO_CAPTION = "no caption"
TEMPLATE_HINT = "--caption-template 'a photo of a {}' makes one of its folder's name"
"""What to do about a picture in a subfolder that has no caption."""

Entry = tuple[Any, ...] | Skipped


def _caption_fault(error: OSError | ValueError, name: str) -> tuple[str, str]:
    """Reason and detail of a caption that cannot be read."""
    if isinstance(error, UnicodeDecodeError):
        return "caption not in UTF-8", f"{name} is not readable as UTF-8"
    if isinstance(error, OSError):
        return "caption cannot be read", f"{name}: {error.strerror}"
    return "damaged line of metadata", f"{name} has changed"


class PictureFolderRecords:
    """The pictures of a folder: a `RecordSource`. Its keys are paths relative to the folder.

    A record's place is (picture,), (picture, text file) or (picture, metadata file, byte of the
    line, number of the picture's line).

    Args:
        template: caption of pictures that have none, with {} for the name of their folder.
        pictures_only: also give the pictures that have no caption, or none that can be read.

    Raises:
        UserError: no such folder, or a template without {}.
    """

    def __init__(self, folder: Path, *, template: str | None = None, pictures_only: bool = False):
        self.folder, self.template = expanded(folder), template
        self.pictures_only = pictures_only
        # `os.path.join` would take a tenth of the time of an index.
        self._root = os.path.join(self.folder, "")
        self._default = functools.cache(self._default_column)
        if not self.folder.is_dir():
            raise UserError(f"no folder {folder}: give one with pictures and their captions")
        check_template(template)

    def count(self) -> int:
        """See `RecordSource`."""
        return sum(1 for _ in self._entries())

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """See `RecordSource`; those of the metadata come first."""
        for entry in itertools.islice(self._entries(), start, None):
            yield entry if isinstance(entry, Skipped) else self.at(entry)

    def at(self, place: Sequence[Any], *, captions_only: bool = False) -> Record | Skipped:
        """See `RecordSource`."""
        name = str(place[0])
        path = self._root + name
        key = f"{name}#{place[3]}" if len(place) == 4 and place[3] else name
        if not os.path.isfile(path):
            named = f"named in {place[1]}, but not there" if len(place) == 4 else ""
            return Skipped(key, "no such file", named)
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            return Skipped(key, "not a picture by its name", "no picture type has this ending")
        try:
            captions = self._captions(place) or ({} if self.pictures_only else None)
        except (OSError, ValueError) as error:
            if not self.pictures_only:
                return Skipped(key, *_caption_fault(error, place[1]))
            captions = {}
        if captions is None:
            named = os.sep in name and self.template is None
            return Skipped(key, NO_CAPTION, TEMPLATE_HINT if named else "")
        if not any(captions.values()) and not self.pictures_only:
            return Skipped(key, "empty caption", "an empty caption")
        return Record(key, captions, functools.partial(_read, path), tuple(place))

    def group(self, place: Sequence[Any]) -> int:
        """See `RecordSource`; any picture can be read alone."""
        return 0

    def fingerprint(self, *, times: bool = True) -> str:
        """See `RecordSource`."""
        state = hashlib.blake2b(digest_size=16)
        for folder, names in self._walk(lambda _: None):
            absolute = os.path.join(self._root, folder, "")
            for name in names:
                try:
                    info = os.stat(absolute + name)
                except OSError:
                    continue
                time = f" {info.st_mtime_ns}" if times else ""
                text = f"{folder}/{name}\0{info.st_size}{time}\0"
                state.update(text.encode("utf-8", "surrogateescape"))
        return state.hexdigest()

    def settings(self) -> dict[str, Any]:
        """See `RecordSource`."""
        return {"data": "folder", "path": str(self.folder), "template": self.template}

    def _captions(self, place: Sequence[Any]) -> dict[str, str] | None:
        if len(place) == 4:
            values = self._row(place[1], place[2])
            return text_columns(_without_name(values), lambda: self._default(place[1]))
        if len(place) == 2:
            return {"text": decode_text(_read(self._root + place[1], limit=MOST_LINE))}
        name = Path(place[0]).parent.name
        if self.template is None or not name:
            return None
        name = one_line(name.replace("_", " ").replace("-", " "))
        return {"text": one_line(self.template.replace("{}", name))}

    def _default_column(self, metadata: str) -> str:
        """See `default_column`, of a metadata file."""

        path = self.folder / metadata
        with open(path, "rb", opener=open_regular) as file:
            rows = (values for _, _, _, values in _rows(file, path))
            return default_column(_without_name(row) for row in rows if row is not None)

    def _row(self, metadata: str, start: int) -> dict[str, Any]:
        """The object of the line at a byte of a metadata file; `ValueError` if there is none."""
        path = self.folder / metadata
        with open(path, "rb", opener=open_regular) as file:
            if path.name == METADATA:
                file.seek(start)
                return parse_object(file.readline(MOST_LINE))
            header = next(_cells(file, path), (0, []))[1]
            file.seek(start)
            row = next(_cells(file, path), (0, []))[1]
            return dict(zip(header, row, strict=True))

    def _walk(self, failed: Callable[[OSError], None]) -> Iterator[tuple[str, list[str]]]:
        """(relative folder, sorted names of its files); hidden ones are left out."""
        for folder, folders, files in os.walk(self.folder, onerror=failed):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            relative = os.path.relpath(folder, self.folder)
            names = sorted(name for name in files if not name.startswith("."))
            yield ("" if relative == "." else relative), names

    def _entries(self) -> Iterator[Entry]:
        """The places of all records in order, and what is skipped without a look at captions."""
        repeated = set(self._named[1:][self._named[1:] == self._named[:-1]].tolist())
        seen: Counter[int] = Counter()
        for entry in self._metadata():
            if isinstance(entry, Skipped) or (name := _hash(entry[0])) not in repeated:
                yield entry if isinstance(entry, Skipped) else (*entry, 0)
            else:
                yield (*entry, seen[name])
                seen[name] += 1
        errors: list[OSError] = []
        for folder, names in self._walk(errors.append):
            yield from self._unnamed(folder, names)
            while errors:
                error = errors.pop()
                name = os.path.relpath(error.filename or self.folder, self.folder)
                yield Skipped(name, "folder cannot be read", str(error.strerror))

    def _unnamed(self, folder: str, names: list[str]) -> Iterator[Entry]:
        """The entries of a folder's pictures that are not in the metadata."""
        start = os.path.join(folder, "") if folder else ""
        stems = {name: os.path.splitext(name) for name in names}
        texts = {_stem(stem): name for name, (stem, end) in stems.items() if end.lower() == ".txt"}
        pictures = {_stem(s) for s, end in stems.values() if end.lower() in SUFFIXES}
        for name, (stem, end) in stems.items():
            text = texts.get(_stem(stem))
            if end.lower() not in SUFFIXES:
                # Another kind of file with a caption of its name was meant as a picture.
                captioned = text not in (None, name) and _stem(stem) not in pictures
                if not captioned or end.lower() in (".json", ".jsonl"):
                    continue
            path = start + name
            if not self._is_named(path):
                yield (path,) if text is None else (path, start + text)

    def _is_named(self, path: str) -> bool:
        if not len(self._named):
            return False
        place = int(np.searchsorted(self._named, _hash(path)))
        return place < len(self._named) and int(self._named[place]) == _hash(path)

    @functools.cached_property
    def _named(self) -> np.ndarray:
        """Sorted 64-bit hashes of the pictures in the metadata."""
        entries = (entry for entry in self._metadata() if not isinstance(entry, Skipped))
        return np.sort(np.fromiter((_hash(entry[0]) for entry in entries), np.uint64))

    def _metadata(self) -> Iterator[tuple[str, str, int] | Skipped]:
        """(picture, metadata file, byte of the line) of each line."""
        for folder, names in self._walk(lambda _: None):
            found = next((name for name in (METADATA, TABLE) if name in names), None)
            if found is None:
                continue
            name = os.path.join(folder, found)
            try:
                with open(self.folder / name, "rb", opener=open_regular) as file:
                    yield from self._lines(folder, name, file)
            except OSError as error:
                raise UserError(f"cannot read {self.folder / name}: {error.strerror}") from None

    def _lines(self, folder: str, metadata: str, file) -> Iterator[tuple[str, str, int] | Skipped]:
        expected = f'{{"{NAME}": "cat.png", "text": "a cat"}}'
        if metadata.endswith(TABLE):
            expected = f"the columns {NAME} and text"
        for number, start, line, values in _rows(file, self.folder / metadata):
            try:
                if values is None:
                    raise ValueError("no object")
                picture = self._found(folder, values[NAME])
            except (KeyError, TypeError, ValueError):
                shown = line[:60].decode("utf-8", "replace").strip()
                if values and NAME not in values:
                    shown = f"the columns {', '.join([*values][:MOST_COLUMNS])}"
                yield Skipped(
                    f"{metadata}, line {number}",
                    "damaged line of metadata",
                    f"expected {expected}, got {shown}",
                )
            else:
                yield picture, metadata, start

    def _found(self, folder: str, name: str) -> str:
        """The relative path of a picture, also if its accents are composed in another way.

        `ValueError` for a name that no file can have.
        """
        path = os.path.normpath(self.folder / folder / name)
        os.fsencode(path)  # ValueError: no file can have this name
        if not os.path.exists(path):
            for form in ("NFC", "NFD"):
                if os.path.exists(other := unicodedata.normalize(form, path)):
                    path = other
        return os.path.relpath(path, self.folder)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name."""
    return path.suffix.lower() in SUFFIXES


def check_template(template: str | None) -> None:
    """`UserError` for a template of captions without {}."""
    if template is not None and template.count("{}") != 1:
        raise UserError(f"--caption-template '{template}': put {{}} where the name belongs")


def _without_name(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != NAME}


def _rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, int, bytes, dict[str, Any] | None]]:
    """(number, first byte, line, its object or None if it is damaged) of the lines of metadata.

    A table without `NAME` has the line of its columns alone.
    """
    if path.name == METADATA:
        offset = 0
        for number, line in enumerate(read_lines(file, path), 1):
            start, offset = offset, offset + len(line)
            if line.strip():
                try:
                    yield number, start, line, parse_object(line)
                except ValueError:
                    yield number, start, line, None
        return
    cells = _cells(file, path)
    try:
        header = next(cells, (0, []))[1]
    except UserError:
        header = []  # no table of captions
    if NAME not in header:
        yield 1, 0, b"no table", dict.fromkeys(header)
        return
    for number, (start, row) in enumerate(cells, 2):
        if row:
            values = dict(zip(header, row, strict=True)) if len(row) == len(header) else None
            yield number, start, ",".join(row).encode("utf-8", "replace"), values


def _cells(file: IO[bytes], path: Path) -> Iterator[tuple[int, list[str]]]:
    """(first byte, cells) of each row of a table from where `file` is; a cell may have lines.

    Raises:
        UserError: it is no CSV in UTF-8.
    """
    offset = file.tell()

    def lines() -> Iterator[str]:
        nonlocal offset
        for line in read_lines(file, path):
            offset += len(line)
            yield decode(line, path)

    rows = csv.reader(lines())
    while True:
        start = offset
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if row is None:
            return
        yield start, row


def _read(path: str, most: int = -1, *, limit: int = MAX_BYTES) -> bytes:
    # Of small files, buffers take as long as all else.
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        check_size(file, limit)
        return file.read(most) or b""


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _hash(name: str) -> int:
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
