"""Files and folders that are written whole or not at all, and JSON files.

Writers: models in checkpoint/model.py (`save_pretrained`), LoRAs in lora/files.py, pictures in
metadata.py, checkpoints of training in train/loop/checkpoint.py.

Unfinished files are in a hidden folder beside their destination and are renamed at the end, so that
no other process reads an incomplete file. The hidden folder remains only if the process is killed;
the next command that writes beside it deletes it. A folder in use is locked.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError


def expanded(path: str | Path) -> Path:
    """`path` with the home folder in place of ~; "~name" stays where there is no such user."""
    return Path(os.path.expanduser(path))


def check_new(folder: Path) -> None:
    """`UserError` if `folder` is a file or not empty, or cannot be created."""
    folder = expanded(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose another name or delete it")
    check_writable(folder.parent)


def check_writable(folder: Path) -> None:
    """`UserError` unless `folder` is a folder that can be written to, or created."""
    existing = expanded(folder)
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write into {existing}")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` at the end, or deleted after an error.

    Raises:
        UserError: `folder` is not empty, or cannot be written.
    """
    folder = expanded(folder)
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
    _delete_abandoned(path.parent)
    hidden, lock = _hidden_folder(path.parent)
    try:
        yield hidden / path.name
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)


HIDDEN = ".snapgen-"
"""Start of the hidden folders' names."""


def _hidden_folder(parent: Path) -> tuple[Path, int]:
    """A new private folder, and its lock; the files in it have the usual permissions."""
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=HIDDEN, dir=parent))
        # Another process may take it for abandoned until it is locked, and delete it.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(hidden, os.O_RDONLY)
            with contextlib.suppress(OSError):  # some network drives have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if hidden.is_dir():
                return hidden, lock
            os.close(lock)


def _delete_abandoned(parent: Path) -> None:
    """Delete the hidden folders of processes that were killed."""
    for hidden in parent.glob(f"{HIDDEN}*"):
        with contextlib.suppress(OSError):
            lock = os.open(hidden, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(hidden)
            finally:
                os.close(lock)


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
