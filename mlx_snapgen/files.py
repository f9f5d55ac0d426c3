"""Files and folders that are written whole or not at all.

What is under way stands in a hidden folder beside its destination and is renamed at the end, so
that nobody meets half of it. Only a killed process leaves the hidden folder behind.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_snapgen.errors import UserError


def check_new(folder: Path) -> None:
    """`UserError` when `folder` is a file or holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another name or delete it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, and goes if anything fails.

    Raises:
        UserError: `folder` holds something, or the disk does not take it.
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
    """A path to write to that becomes `path` at the end, and goes if anything fails.

    Args:
        replace: put it in the place of a file that is there.

    Raises:
        FileExistsError: there is one, and it is not to be replaced.
        OSError: the disk does not take it, or the parent is no folder.
    """
    with _beside(path) as partial:
        yield partial
        if replace:
            os.replace(partial, path)
        else:
            _move_to_free(partial, path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder of its own, on the same disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent) from None
    # The folder is private; what is made in it is as readable as anything else.
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
