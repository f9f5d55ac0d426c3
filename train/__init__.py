"""Trainers of mlx_snapgen; run from a clone as `python -m train.NAME`."""

import mlx_snapgen  # noqa: F401  (before mlx, or MLX links its slow reference BLAS on Linux)
