"""Errors: one line and exit code 2 for a user's mistake, a traceback for a bug."""

import contextlib
import difflib
import errno
import io
import itertools
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mlx_snapgen._kernel_cache import make_private_cache

MOST_CHARACTERS = 300
"""Of the message of a `UserError`."""
MOST_OF_FAULTS = 250
"""Characters of the faults that one message names."""


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong and what to do.

    What a file or a user gave may be quoted in full: line breaks and control characters are
    replaced, and the middle of a long message is cut out. See also `as_given`.

    Attributes:
        uncut: the whole message.
    """

    def __init__(self, message: object = ""):
        self.uncut = as_given(message)
        super().__init__(one_line(self.uncut, MOST_CHARACTERS))


class SettingsError(UserError):
    """Settings that a model cannot draw with, found while it is opened."""


class ModelError(UserError):
    """A model that cannot be loaded: its files are damaged or gone."""


AGAIN = "get it again"
"""In messages about damaged files."""

_given: dict[str, str] = {}


def show_as(folder: Path, name: str) -> None:
    """Let messages name a folder of a cache as the user did."""
    _given[str(folder)] = name


def as_given(text: object) -> str:
    """`text` with the names of `show_as`; not of a damaged file, which the user has to find."""
    shown = str(text)
    if AGAIN in shown:
        return shown
    for folder, name in list(_given.items()):
        shown = shown.replace(folder, name)
    return shown


def check_faults(faults: Sequence[str]) -> None:
    """`UserError` with as many of the faults as a message has room for, if there are any."""
    ends = itertools.accumulate(len(fault) + 2 for fault in faults)
    count = sum(end <= MOST_OF_FAULTS for end in ends) or 1
    if faults:
        raise UserError("; ".join([*faults[:count], *["and more"] * (len(faults) > count)]))


def one_line(text: object, most: int) -> str:
    """`text` in one line of at most `most` characters, with "..." for what is cut in the middle."""
    line = str(text)
    if len(line) > 4 * most:  # before the work on each character
        line = f"{line[: 2 * most]} ... {line[-2 * most :]}"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.split()))
    if len(line) > most:
        start = (most - 5) * 2 // 3
        line = f"{line[:start]} ... {line[len(line) - (most - 5 - start) :]}"
    return line


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """A `UserError` in this context names `path`, as its own message may."""
    try:
        yield
    except UserError as error:
        if as_given(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None


@contextlib.contextmanager
def of_settings() -> Iterator[None]:
    """A `UserError` in this context is a `SettingsError`."""
    try:
        yield
    except UserError as error:
        raise SettingsError(error) from None


def plural(count: int, word: str) -> str:
    """A number of things: "1 picture", "1,200 pictures"."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def shown_bytes(count: float) -> str:
    """A size with a digit that is not 0, however small: 6.2 GB, 120.0 MB, 4.5 kB, 1 byte."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return plural(round(count), "byte")


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """A hint " (did you mean 'x'?)" with the known name closest to `name`, or ""; 1 is equal."""
    names = {each.lstrip("-"): each for each in known}
    match = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=cutoff)
    return f" (did you mean '{names[match[0]]}'?)" if match else ""


def _end_bars() -> None:
    """End the bars that an error has left on the terminal, so that its line stands alone."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _open_standard_streams() -> None:
    """Standard streams that the caller has closed get /dev/null.

    Otherwise the next file that is opened has one of their numbers, and MLX takes 0 for an error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        reason = f"the current folder is gone ({error.strerror})"
        raise UserError(f"{reason}: change to another one") from None


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit.

    Exit codes: 0, its own, 2 after a `UserError`, a full disk or a file that the system refuses,
    130 after Ctrl-C, 141 without a message if the reader of the output has gone, as with `| head`.
    """
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        # A file's name may have bytes that are no text, and a terminal may have few characters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            _check_folder()
            make_private_cache()
            code = main() or 0
            sys.stdout.flush()
        except RuntimeError:
            # Ctrl-C also ends a compiler that mlx has started, and mlx's error may come first.
            time.sleep(0.1)
            raise
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            # All is done: until the process has ended, no traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(code)
    except BrokenPipeError:
        if not _has_no_reader(sys.stdout):
            raise
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UserError as error:
        _end_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and error.filename is None:
            raise
        _end_bars()
        if not is_full:
            print(f"error: {UserError(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
            sys.exit(2)
        where = f" of {Path(error.filename).parent}" if error.filename else ""
        print(
            f"error: the disk{where} is full: free some space and run the same command again",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        _end_bars()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
