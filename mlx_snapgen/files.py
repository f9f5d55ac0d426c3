"""Files and folders that are written whole or not at all, and JSON files.

Unfinished files are in a hidden folder beside their destination and are renamed at the end, so that
no other process reads an incomplete file. The hidden folder remains only if the process is killed.
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError


def check_new(folder: Path) -> None:
    """`UserError` if `folder` is a file or not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another name or delete it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` at the end, or deleted after an error.

    Raises:
        UserError: `folder` is not empty, or cannot be written.
    """
    folder = folder.expanduser()
    check_new(folder)
    try:
        with _beside(folder) as partial:
            partial.mkdir()
            yield partial
            os.replace(partial, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary path, renamed to `path` at the end, or deleted after an error.

    Args:
        replace: replace an existing file.

    Raises:
        FileExistsError: the file exists, and `replace` is false.
        OSError: it cannot be written, or the parent is not a folder.
    """
    with _beside(path) as partial:
        yield partial
        if replace:
            os.replace(partial, path)
        else:
            _move_to_free(partial, path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a new hidden folder beside it, on the same disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent) from None
    # The folder is private; the files in it have the usual permissions.
    with tempfile.TemporaryDirectory(
        prefix=".", dir=path.parent, ignore_cleanup_errors=True
    ) as hidden:
        yield Path(hidden) / path.name


def _move_to_free(source: Path, target: Path) -> None:
    """Move a file to a name that must be free (`FileExistsError`)."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # exFAT and some network drives have no links: claim the name, then replace the claim.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)


def read_json(path: Path) -> Any:
    """The values in a JSON file; `UserError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
