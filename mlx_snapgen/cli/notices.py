"""What commands print about their work: progress, warnings and peak memory."""

import resource
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_snapgen.errors import MOST_CHARACTERS, UserError, one_line
from mlx_snapgen.vocabulary import listed

PATIENCE = 1.5
"""Seconds before `announce` prints."""


def write_line(text: str) -> None:
    """Print `text` on stderr, above the progress bars if there are any."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:  # importing it takes longer than all that a short command prints
        print(text, file=sys.stderr)


@contextmanager
def announce(text: str, *, enabled: bool = True) -> Iterator[None]:
    """Print `text` as a line if the work in this context takes longer than `PATIENCE`."""
    timer = threading.Timer(PATIENCE, lambda: write_line(text))
    timer.daemon = True
    if enabled:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def short_warnings(
    *, name_prompts: bool = True, reword: Callable[[str], str] = str
) -> Iterator[None]:
    """Print each warning as one line; one that is not about a prompt once.

    Args:
        name_prompts: whether a warning about a prompt names it.
        reword: changes the text.
    """
    shown: set[str] = set()

    def show(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        problem = getattr(message, "problem", None)
        if problem is None and text in shown:
            return
        shown.add(text)
        text = text if name_prompts else problem or text
        text = reword(text)
        write_line(f"note: {one_line(text, MOST_CHARACTERS)}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def picture_bar(
    total: int, name: str, *, initial: int = 0, leave: bool = False
) -> Iterator[Callable[[float], object]]:
    """A bar of pictures; yields what advances it by a number of them, also by parts of one."""
    from tqdm import tqdm  # as in `write_line`

    with tqdm(
        total=total,
        desc=name,
        initial=initial,
        leave=leave,
        unit="picture",
        bar_format="{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:
        # The sum of the parts may be a bit more than the whole.
        yield lambda count: bar.update(min(count, total - bar.n))


def print_vocabulary(vocabulary: Mapping[str, Any] | None, model: str) -> None:
    """Print the words that a model understands; `UserError` if that is not known."""
    if vocabulary is None:
        raise UserError(f"{model} has no vocabulary.json: cannot list its words")
    for title, words in listed(vocabulary).items():
        print(f"{title} ({len(words)}): {', '.join(words)}\n")
    backgrounds = vocabulary.get("backgrounds")
    if backgrounds and "transparent" in backgrounds:
        print("If the prompt names no background, it is transparent.")
    elif backgrounds:
        print("If the prompt names no background, it is mostly white, with some seeds a color.")


def peak_process_bytes() -> int:
    """Peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
