"""Files and folders that are written whole or not at all, and readers of text and JSON.

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
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, AnyStr

from mlx_snapgen.errors import UserError, one_line


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


# --- locks --------------------------------------------------------------------------------------

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


# --- reading ----------------------------------------------------------------------------------

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
