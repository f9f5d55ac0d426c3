"""What commands print about their work: progress, warnings and peak memory."""

import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from mlx_snapgen.errors import MOST_CHARACTERS, one_line

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
def short_warnings(*, name_prompts: bool = True) -> Iterator[None]:
    """Print each warning as one line; one that is not about a prompt once.

    Args:
        name_prompts: whether a warning about a prompt names it.
    """
    shown: set[str] = set()

    def show(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        problem = getattr(message, "problem", None)
        if problem is None and text in shown:
            return
        shown.add(text)
        text = text if name_prompts else problem or text
        tqdm.write(f"note: {one_line(text, MOST_CHARACTERS)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def peak_process_bytes() -> int:
    """Peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
