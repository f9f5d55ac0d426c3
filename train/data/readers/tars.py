"""WebDataset tars: the members of a sample share the name before its dot.

They should follow each other; others are joined as far as memory allows, in uncompressed tars only.

A sample has a picture (`.jpg`, `.png`, `.webp`, ...) and captions: in a `.txt`, in further texts
such as `.short.txt` (column "short"), or in the texts of a `.json`.
"""

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import MAX_BYTES
from mlx_snapgen.reading import MOST_LINE, open_regular
from train.data.readers.captions import (
    FIRST,
    decode_text,
    default_column,
    parse_object,
    text_columns,
)
from train.data.readers.folder import SUFFIXES
from train.data.source import Record, Skipped

COUNTED = 2**34
"""Bytes of tars up to which a pass over their headers counts the samples."""
WAITING = 2**16
"""Samples of a tar that may wait for the rest of their members."""
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = (".gz", ".tgz")


class Member(NamedTuple):
    """A file of a sample: `name` is what follows the sample's; `data` is None if not read yet."""

    name: str
    offset: int
    size: int
    data: bytes | None = None


Sample = tuple[str, list[Member]]
"""Name and members."""


class TarRecords:
    """The samples of WebDataset tars: a `RecordSource`. Keys are "TAR:SAMPLE".

    A record's place is (number of the tar, sample, [suffix, offset, size] of each member, ...).

    Args:
        paths: .tar, .tar.gz or .tgz files, read in this order; compressed ones in order only.
    """

    def __init__(self, paths: Sequence[Path], *, pictures_only: bool = False):
        self.paths, self.pictures_only = list(paths), pictures_only
        self.names = short_names(self.paths)
        self._default = functools.cache(self._default_column)

    def count(self) -> int | None:
        """See `RecordSource`."""
        sizes = [path.stat().st_size for path in self.paths]
        if self.compressed or sum(sizes) > COUNTED:
            return None
        return sum(1 for path in self.paths for _ in self._samples(path))

    @functools.cached_property
    def compressed(self) -> Path | None:
        """The first compressed file."""
        return next((path for path in self.paths if _is_compressed(path)), None)

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """See `RecordSource`; a damaged tar ends with one skipped record."""
        samples = (
            (number, sample)
            for number, path in enumerate(self.paths)
            for sample in self._samples(path)
        )
        for number, sample in itertools.islice(samples, start, None):
            if isinstance(sample, Skipped):
                key = f"{self.names[number]}:{sample.key}" if sample.key else self.names[number]
                yield Skipped(key, sample.reason, sample.detail)
            else:
                yield self._record(number, *sample)

    def at(self, place: Sequence[Any], *, captions_only: bool = False) -> Record | Skipped:
        """See `RecordSource`."""
        number, sample, *members = place
        self._check_order()
        return self._record(number, sample, [Member(*member) for member in members])

    def group(self, place: Sequence[Any]) -> int:
        """See `RecordSource`; any picture can be read alone."""
        self._check_order()
        return 0

    def fingerprint(self, *, times: bool = True) -> str:
        """See `RecordSource`."""
        return file_hash(self.paths, times=times)

    def settings(self) -> dict[str, Any]:
        """See `RecordSource`."""
        return {"data": "tar", "path": [str(path) for path in self.paths]}

    def _samples(self, path: Path) -> "Iterator[Sample | Skipped]":
        """See `_samples`, joined."""
        samples = _samples(path)
        if _is_compressed(path):  # its pictures would be in memory
            return samples
        return _joined(samples, pictures_only=self.pictures_only)

    def _default_column(self, number: int) -> str:
        """See `default_column`, of a tar; texts in files of their own come before those in JSON."""
        path = self.paths[number]

        def objects() -> Iterator[dict[str, Any]]:
            for sample in self._samples(path):
                texts = [] if isinstance(sample, Skipped) else sample[1]
                with contextlib.suppress(_Unreadable):
                    main, others, values = _parsed(path, [m for m in texts if _is_text(m.name)])
                    yield main or dict(list(others.items())[:1]) or values

        return default_column(objects())

    def _check_order(self) -> None:
        if self.compressed:
            raise UserError(
                f"{self.compressed} can only be read in order: encode it first with "
                "python -m train.prepare, or unpack it with gunzip"
            )

    def _record(self, number: int, sample: str, members: list[Member]) -> Record | Skipped:
        path, key = self.paths[number], f"{self.names[number]}:{sample}"
        picture = next((m for m in members if f".{m.name}" in SUFFIXES), None)
        texts = [m for m in members if _is_text(m.name)]
        together = _TOGETHER if len(members) == 1 and _is_compressed(path) else ""
        if picture is None:
            return Skipped(key, "no picture", together)
        if not texts and not self.pictures_only:
            return Skipped(key, "no caption", together)
        try:
            captions = _captions(path, texts, lambda: self._default(number))
        except _Unreadable as error:
            if not self.pictures_only:
                return Skipped(key, str(error), f"{sample}.{error.suffix}")
            captions = {}
        if not any(captions.values()) and not self.pictures_only:
            return Skipped(key, "empty caption")
        place = (number, sample, *([m.name, m.offset, m.size] for m in (picture, *texts)))

        def read(most: int = -1) -> bytes:
            return _contents(path, picture, most=most)

        return Record(key, captions, read, place)


_TOGETHER = (
    "the members of a sample must follow each other in a compressed tar; write it with --sort=name"
)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of files relative to the folder that has them all."""
    if len(paths) == 1:
        return [paths[0].name]
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    return [os.path.relpath(path.absolute(), folder) for path in paths]


def file_hash(paths: Sequence[Path], *, times: bool) -> str:
    """A hash of the names, sizes and times of files; see `RecordSource.fingerprint`."""
    infos: list[tuple[Any, ...]]
    if times:
        infos = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    else:
        names = short_names(paths)
        infos = [(name, path.stat().st_size) for name, path in zip(names, paths, strict=True)]
    return hashlib.blake2b(json.dumps(infos).encode(), digest_size=16).hexdigest()


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


def _is_text(suffix: str) -> bool:
    return suffix in ("txt", "json") or suffix.endswith(".txt")


class _Unreadable(Exception):
    """A caption that cannot be read; the message is the reason."""

    def __init__(self, reason: str, suffix: str):
        super().__init__(reason)
        self.suffix = suffix


def _captions(path: Path, texts: Sequence[Member], default: Callable[[], str]) -> dict[str, str]:
    """Captions in the members of a sample; the first is that of .txt, or else that of .json.

    Args:
        default: the first column if it is neither.
    """
    main, others, values = _parsed(path, texts)
    listed = text_columns(values) if values else {}
    ordered = (main, listed, others) if any(list(listed.values())[:1]) else (main, others, listed)
    captions: dict[str, str] = {}
    for part in ordered:
        captions |= {name: text for name, text in part.items() if not captions.get(name)}
    if not main and not any(name in values for name in FIRST):
        first = default()
        if first in captions or not others:
            captions = {first: captions.get(first, ""), **captions}
    return captions


def _parsed(
    path: Path, texts: Sequence[Member]
) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Of the members of a sample: the caption in .txt, those in further texts, and the JSON."""
    main, others, values = {}, {}, {}
    for text in texts:
        suffix = text.name
        try:
            data = _contents(path, text)
            if suffix == "json":
                values = parse_object(data)
            elif suffix == "txt":
                main["text"] = decode_text(data)
            else:
                others[suffix.removesuffix(".txt")] = decode_text(data)
        except UnicodeDecodeError:
            raise _Unreadable("caption not in UTF-8", suffix) from None
        except ValueError:
            raise _Unreadable("damaged JSON", suffix) from None
        except OSError:
            raise _Unreadable("caption cannot be read", suffix) from None
    return main, others, values


def _contents(path: Path, member: Member, *, most: int = -1) -> bytes:
    if member.size > (MOST_LINE if _is_text(member.name) else MAX_BYTES):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if member.data is not None:
        return member.data if most < 0 else member.data[:most]
    size = member.size if most < 0 else min(member.size, most)
    with open(path, "rb", buffering=0, opener=open_regular) as file:
        file.seek(member.offset)
        found = file.read(size)
        while len(found) < size and (more := file.read(size - len(found))):
            found += more
    return found


class _Damaged(Exception):
    """A tar ends in the middle, or has something else where a member starts."""


def _joined(
    samples: Iterator[Sample | Skipped], *, pictures_only: bool
) -> Iterator[Sample | Skipped]:
    """The samples, with pictures and captions joined that do not follow each other.

    Incomplete samples wait for their other part, at most `WAITING` of them.
    """

    def missing(members: list[Member]) -> list[bool]:
        picture = any(f".{m.name}" in SUFFIXES for m in members)
        return [not picture, not (pictures_only or any(_is_text(m.name) for m in members))]

    waiting: dict[str, list[Member]] = {}
    ending = []
    for item in samples:
        if isinstance(item, Skipped):
            ending.append(item)
            continue
        name, members = item
        before = waiting.get(name, [])
        if not any(missing(members)):
            yield item
        elif missing(members) != missing(before) and not any(missing(before + members)):
            del waiting[name]
            yield name, before + members
        elif before:
            yield item  # the same part twice
        else:
            waiting[name] = members
            if len(waiting) > WAITING:
                first = next(iter(waiting))
                yield first, waiting.pop(first)
    yield from waiting.items()
    yield from ending


def _samples(path: Path) -> Iterator[Sample | Skipped]:
    """(name, members) of the whole samples of a tar, and if it is damaged, a line on that."""
    sample = ""
    members: list[Member] = []
    ending = None
    try:
        with (
            open(path, "rb", opener=open_regular) as stored,
            cast(IO[bytes], gzip.open(stored) if _is_compressed(path) else stored) as file,
        ):
            for member in _members(file, seekable=not _is_compressed(path)):
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem or not suffix:  # hidden ones too
                    continue
                stem = f"{folder}/{stem}" if folder else stem
                if stem != sample and members:
                    yield sample, members
                if stem != sample:
                    sample, members = stem, []
                members.append(member._replace(name=suffix.lower()))
    except (_Damaged, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        ending = Skipped("", "damaged tar", " ".join(str(error).split()))
    suffixes = [member.name for member in members]
    complete = any(f".{s}" in SUFFIXES for s in suffixes) and any(map(_is_text, suffixes))
    if members and (complete or ending is None):
        yield sample, members
    if ending is not None:
        after = f" after the sample {sample}" if sample else ""
        yield Skipped("", ending.reason, f"{ending.detail}{after}; get the file again")


def _members(file: IO[bytes], *, seekable: bool) -> Iterator[Member]:
    """The regular files of a tar.

    `tarfile` itself keeps every member in memory, and ends without a word at a damaged one.
    """
    length = file.seek(0, io.SEEK_END) if seekable else 0
    offset = 0
    special: dict[str, str] = {}
    if seekable:
        file.seek(0)
    while True:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise _Damaged("it is cut off" if offset else "no tar file")
        if not any(block):
            return
        name, size, kind = _header(block)
        start, size = offset + BLOCK, int(special.get("size", size))
        padded = -(-size // BLOCK) * BLOCK
        offset = start + padded
        if seekable and start + size > length:
            raise _Damaged("it is cut off")
        data = None
        if kind in _EXTENDED and size > MOST_LINE:
            raise _Damaged("a damaged extended header")
        is_text = name.endswith((b".txt", b".json"))
        if not seekable and size > MAX_BYTES:
            left = padded
            while left and (found := len(file.read(min(left, MOST_LINE)))):
                left -= found
            if left:
                raise _Damaged("it is cut off")
            data = b""
        elif not seekable or kind in _EXTENDED or (is_text and size <= MOST_LINE):
            data = file.read(size)
            if len(data) < size:
                raise _Damaged("it is cut off")
            file.read(padded - size)
        else:
            file.seek(offset)
        if kind in _EXTENDED:
            special |= _extended(kind, data or b"")
        else:
            path = special.get("path") or name.decode("utf-8", "surrogateescape")
            special = {}
            if kind in _FILES:
                yield Member(path.removeprefix("./"), start, size, data)


def _header(block: bytes) -> tuple[bytes, int, bytes]:
    """Name, size and type of a member; faster than `tarfile.TarInfo.frombuf`."""
    if sum(block) - sum(block[148:156]) + 8 * 32 != _number(block[148:156]):
        raise _Damaged("no header of a member where one must be")
    name = block[:100].rstrip(b"\0")
    # The GNU format has times in place of the folder.
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].rstrip(b"\0") + b"/" + name
    return name, _number(block[124:136]), block[156:157]


def _number(field: bytes) -> int:
    """A number in a header: octal digits, or binary if it is large."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _Damaged("no header of a member where one must be") from None


_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENDED = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """The fields of an extended header: "path" and "size" matter."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise _Damaged("a damaged extended header")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return {name: value for name, value in fields.items() if name in ("path", "size")}
