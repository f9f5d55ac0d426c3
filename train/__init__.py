"""Trainers of mlx_snapgen; run from a clone as `python -m train.NAME`."""

import os
import sys

import mlx_snapgen  # noqa: F401  (before mlx, or MLX links its slow reference BLAS on Linux)


def _has_no_size() -> bool:
    """Whether stderr is a terminal that reports 0 columns, as some of containers and editors do."""
    try:
        return sys.stderr is not None and os.get_terminal_size(sys.stderr.fileno()).columns == 0
    except (OSError, ValueError):
        return False


if _has_no_size():
    # tqdm would cut its bars to nothing; it reads these when it is imported.
    os.environ.setdefault("TQDM_NCOLS", "79")
    os.environ.setdefault("TQDM_NROWS", "24")
