"""Progress bars in a terminal of unknown size; imported before tqdm, which reads its variables."""

import os
import sys


def set_bar_size() -> None:
    """Let tqdm draw bars where stderr is a terminal without a size, as in some containers and
    editors: it would cut them to nothing."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # no stderr, or none that is a terminal
        return
    if size.columns == 0:
        os.environ.setdefault("TQDM_NCOLS", "79")
    if size.lines == 0:
        os.environ.setdefault("TQDM_NROWS", "24")
