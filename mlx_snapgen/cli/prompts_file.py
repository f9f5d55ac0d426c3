"""Files of prompts, one per line."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError


def read_prompts(path: str | Path) -> Iterator[str]:
    """The prompts in a UTF-8 file, read line by line on demand.

    Empty lines and those that start with # are skipped.

    Args:
        path: "-" is stdin. A file is opened immediately, so a missing one is an error of this call.

    Raises:
        UserError: no such file, a file that is not UTF-8, or (raised at its end) one without
            prompts.
    """
    if str(path) == "-":
        return _prompts(sys.stdin, nullcontext(), name="stdin")
    try:
        file = open(path, encoding="utf-8-sig")  # noqa: SIM115  (closed by the generator)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _prompts(file, file, name=str(path))


def _prompts(lines: Any, closing: Any, *, name: str) -> Iterator[str]:
    count = 0
    with closing:
        try:
            for line in lines:
                prompt = line.strip()
                if prompt and not prompt.startswith("#"):
                    count += 1
                    yield prompt
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"cannot read {name}: {error}") from None
    if not count:
        raise UserError(f"{name} has no prompts")
