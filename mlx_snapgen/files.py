"""Paths of users, and files and folders that are written whole or not at all.

Writers: models in checkpoint/model.py (`save_pretrained`), LoRAs in lora/files.py, pictures in
metadata.py, checkpoints of training in train/loop/checkpoint.py.

Unfinished files are in a hidden folder beside their destination and are renamed at the end, so that
no other process reads an incomplete file. The hidden folder remains only if the process is killed;
the next command that writes beside it deletes it. A folder in use is locked.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError


def expanded(path: str | Path) -> Path:
    """A path from a user, with the home folder in place of ~; "~name" stays without such a user.

    Raises:
        UserError: it is empty, too long, in a folder of another user, a circle of links, or has a
            null byte.
    """
    if path == "":
        raise UserError("the name of a file or folder is empty")
    found = Path(os.path.expanduser(path))
    try:
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be a file to write
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot use {found}: {reason}") from None
    return found


def is_unicode(text: object) -> bool:
    """Whether UTF-8 can hold a text; the name of a file may have bytes that are none."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_link(path: Path) -> None:
    """`UserError` for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist")


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
    try:
        # Some file systems, such as /proc, permit what they do not support.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {existing}: {error.strerror}") from None


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
        # What is written may be read from files at the same time.
        source = error.filename
        if isinstance(source, str | Path) and not Path(source).is_relative_to(folder.parent):
            raise UserError(f"cannot read {source}: {error.strerror}") from None
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
        try:
            yield partial
        except OSError as error:
            # A write that fails does not name its file.
            if error.filename is None and error.errno is not None:
                error.filename = str(path)
            raise
        if replace:
            os.replace(partial, path)
        else:
            _move_to_free(partial, path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a new hidden folder beside it, on the same disk."""
    with temporary_folder(path.parent) as hidden:
        yield hidden / path.name


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new private folder in `parent`, deleted at the end.

    Before, those of killed processes in `parent` are deleted.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), parent) from None
    _delete_abandoned(parent)
    hidden, lock = _hidden_folder(parent)
    try:
        yield hidden
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
            lock = os.open(hidden, os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # some network drives have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if hidden.is_dir():
                return hidden, lock
            os.close(lock)


def _delete_abandoned(parent: Path) -> None:
    """Delete this user's hidden folders of processes that were killed."""
    for hidden in parent.glob(f"{HIDDEN}*"):
        with contextlib.suppress(OSError):
            lock = os.open(hidden, os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
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


FULL = 2**20
"""Free bytes below which a failed write is put down to a full disk."""


def save_tensors(path: Path, tensors: Any, header: Mapping[str, str] | None = None) -> None:
    """`mx.save_safetensors`, with an `OSError` if the file cannot be written."""
    import mlx.core as mx  # here, because the rest of this module does not need it

    try:
        with contextlib.nullcontext(str(path)) if is_unicode(path) else open(path, "wb") as file:
            mx.save_safetensors(file, tensors, dict(header or {}))
    except RuntimeError as error:
        if not str(error).startswith(("[write]", "[save_safetensors]")):
            raise
        if shutil.disk_usage(path.parent).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise OSError(errno.EIO, str(error)) from None


_locks: dict[Path, int] = {}


def lock_folder(folder: Path, *, shared: bool = False) -> bool:
    """Lock a folder until `unlock_folder`, or until the process ends, however it ends.

    A network drive without locks counts as locked.

    Args:
        shared: several processes may have the lock, if all of them share it.

    Returns:
        False if it is locked already.

    Raises:
        OSError: no such folder, or another process has just deleted it.
    """
    folder = folder.resolve()
    if folder in _locks:
        return False
    lock = os.open(folder, os.O_DIRECTORY)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    except OSError:
        pass
    # Between the two calls, the one who had the lock may have deleted the folder.
    if not folder.is_dir() or not os.path.samestat(os.fstat(lock), os.stat(folder)):
        os.close(lock)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    _locks[folder] = lock
    return True


def has_lock(folder: Path) -> bool:
    """Whether this process has locked a folder."""
    return folder.resolve() in _locks


def unlock_folder(folder: Path) -> None:
    """Give back the lock of a folder, if this process has it."""
    lock = _locks.pop(folder.resolve(), None)
    if lock is not None:
        os.close(lock)
