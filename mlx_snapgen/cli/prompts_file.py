"""Files of prompts, one per line."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.reading import check_regular, decode_text, read_lines

_OPENED = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/([0-9]{1,9})")
"""Names of the files that are open in this process."""


def read_prompts(path: str | Path) -> Iterator[str]:
    """The prompts in a UTF-8 file, read line by line on demand.

    Empty lines and those that start with # are skipped.

    Args:
        path: "-" is stdin. A shell's <(command), /dev/stdin and other names of what is open in this
            process may be of any kind, such as a pipe or a terminal. A file is opened immediately,
            so a missing one is an error of this call.

    Raises:
        UserError: no such file, a file that is not UTF-8, or (raised at its end) one without
            prompts.
    """
    if str(path) == "-":
        return _stdin_prompts()
    path = expanded(path)
    opened = None if path.is_file() else _OPENED.fullmatch(str(path))
    descriptor = opened and int(opened[1] or 0)
    if descriptor == 0:
        return _stdin_prompts()
    try:
        if descriptor is not None:
            file = open(os.dup(descriptor), "rb")  # noqa: SIM115  (closed by the generator)
        else:
            check_regular(path)
            file = open(path, "rb")  # noqa: SIM115
            file.seek(0)  # on macOS a name of an open file has its position
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _prompts(file, file, name=str(path))


def _stdin_prompts() -> Iterator[str]:
    # Text of another encoding than UTF-8 in the terminal's locale stays an error.
    return _prompts(getattr(sys.stdin, "buffer", sys.stdin), nullcontext(), name="stdin")


def count_prompts(path: str | Path) -> int:
    """The number of prompts in a file, up to a line that cannot be read.

    Raises:
        UserError: there is none.
    """
    count = 0
    try:
        for _ in read_prompts(path):
            count += 1
    except UserError:
        if not count:
            raise
    return count


def _prompts(lines: Any, closing: Any, *, name: str) -> Iterator[str]:
    """Lines of bytes, or of text from a stream that has none, end at \\n only."""
    count = 0
    with closing:
        try:
            for number, line in enumerate(read_lines(lines, name), 1):
                if isinstance(line, bytes):
                    line = decode_text(line, f"{name}, line {number}")
                prompt = line.removeprefix("\ufeff").strip()
                if prompt and not prompt.startswith("#"):
                    count += 1
                    yield prompt
        except OSError as error:
            raise UserError(f"cannot read {name}: {error.strerror}") from None
    if not count:
        raise UserError(f"{name} has no prompts")
