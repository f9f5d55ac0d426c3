"""Files of unknown origin: bytes, text and JSON, read within bounds."""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from mlx_snapgen.errors import UserError, one_line

MOST_BYTES = 2**26
"""Of a text file that is read at once. The largest in use is a tokenizer of 33 MB."""
MOST_JSON = 2**22
"""Bytes of a config; other files of JSON may be larger."""
MOST_LINE = 2**22
"""Bytes of a line of a text file that is read line by line."""
MOST_DEPTH = 64
"""Of JSON."""
MOST_INTEGER = 2**64
"""Of JSON, in absolute value."""


def check_regular(path: str | Path) -> None:
    """`OSError` for a folder, and for a pipe, socket or device, which may block or never end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for what, is_one in _OTHERS.items():
        if is_one(mode):
            raise OSError(errno.EINVAL, f"it is a {what}, not a file", str(path))


_OTHERS = {
    "pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """The descriptor of a file of unknown origin, also as the `opener` of `open`.

    Raises:
        OSError: see `check_regular`.
    """
    if not flags & os.O_CREAT or os.path.exists(path):
        check_regular(path)
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """The contents of a file; `UserError` if it cannot be read or is larger than `most` bytes."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}") from None
    if len(data) > most:
        raise UserError(f"cannot read {path}: it is larger than {most // 2**20} MiB")
    return data


def check_size(file: IO[Any], most: int) -> None:
    """`OSError` for an open file of more than `most` bytes."""
    if os.fstat(file.fileno()).st_size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), file.name)


def read_line(file: IO[AnyStr], name: object) -> AnyStr:
    """The next line of a file of unknown origin; `UserError` if it has more than `MOST_LINE`."""
    line = file.readline(MOST_LINE + 1)
    if len(line) > MOST_LINE:
        raise UserError(f"cannot read {name}: a line has more than {MOST_LINE // 2**20} MiB")
    return line


def read_lines(file: IO[AnyStr], name: object) -> Iterator[AnyStr]:
    """See `read_line`."""
    while line := read_line(file, name):
        yield line


def decode_text(data: bytes, where: object) -> str:
    """UTF-8, with or without a byte-order mark, as text; `UserError` names `where`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {where}: it is not UTF-8 (byte {error.start})") from None


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """A UTF-8 file as text; `UserError` if it cannot be read. Lines end at \\n only."""
    return decode_text(read_bytes(path, most=most), path)


def read_json(path: Path, *, most: int = MOST_JSON, paths: bool = False) -> Any:
    """The values in a JSON file of at most `most` bytes; `UserError` if it is missing or damaged.

    See `parse_json`.
    """
    return parse_json(read_bytes(path, most=most), path, paths=paths)


def read_object(path: Path, *, most: int = MOST_JSON, paths: bool = False) -> dict[str, Any]:
    """The object in a JSON file; `UserError` if there is none. See `parse_json`."""
    values = read_json(path, most=most, paths=paths)
    if not isinstance(values, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object")
    return values


def parse_json(text: str | bytes, where: object, *, paths: bool = False) -> Any:
    """The values in a JSON text of unknown origin.

    Args:
        paths: it may have paths with bytes that are no UTF-8, in the form of `os.fsdecode`.

    Raises:
        UserError: names `where` the text is from. It is no UTF-8 or no JSON, is nested more than
            `MOST_DEPTH` deep, or has a number that is infinite, not a number, or over
            `MOST_INTEGER`, or half of a surrogate pair.
    """
    if isinstance(text, bytes):
        text = decode_text(text, where)
    try:
        # The readers of larger files, with millions of numbers, check their values themselves.
        is_small = len(text) <= MOST_JSON
        values = (_DECODER if is_small and _SUSPECT.search(text) else _PLAIN).decode(text)
        if is_small:
            _check_depth(values)
        escaped = not text.isascii() or "\\u" in text
        if escaped and re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text):
            errors = "surrogateescape" if paths else "strict"
            json.dumps(values, ensure_ascii=False).encode(errors=errors)
    except UnicodeEncodeError:
        raise UserError(f"cannot read {where}: it has half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"cannot read {where}: {one_line(reason, 120)}") from None
    return values


def _integer(text: str) -> int:
    # Python refuses to convert numbers of more than 4300 digits.
    if len(text) > 20 or abs(int(text)) > MOST_INTEGER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"'{one_line(text, 20)}' is no finite number")
    return number


_SUSPECT = re.compile(r"\d{20}|[eE]\+?\d{3}|NaN|Infinity")
"""Occurs in every JSON text with a number that is refused; without it, a faster decoder does."""
_PLAIN = json.JSONDecoder()
_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_finite)


def _check_depth(values: Any) -> None:
    level = [values] if isinstance(values, dict | list) else []
    for _ in range(MOST_DEPTH + 1):
        if not level:
            return
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
    raise RecursionError
