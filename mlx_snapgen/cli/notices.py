"""What commands print about their work: progress, warnings and peak memory."""

import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

PATIENCE = 1.5
"""Seconds before `announce` prints."""


@contextmanager
def announce(text: str, *, enabled: bool = True) -> Iterator[None]:
    """Print `text` as a line if the work in this context takes longer than `PATIENCE`."""
    timer = threading.Timer(PATIENCE, lambda: tqdm.write(text, file=sys.stderr))
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def short_warnings() -> Iterator[None]:
    """Print each warning as one line."""

    def show(message, category, filename, lineno, file=None, line=None):
        tqdm.write(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def peak_process_bytes() -> int:
    """Peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
