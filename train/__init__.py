"""Trainers of mlx_snapgen; run from a clone as `python -m train.NAME`."""

import mlx_snapgen  # noqa: F401  (before mlx: it puts a fast BLAS in front on Linux)
