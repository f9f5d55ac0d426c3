"""Conversion of public checkpoints and PyTorch weights, and export to PyTorch and Core ML."""

import mlx_snapgen  # noqa: F401  loads a fast BLAS, which must happen before mlx is imported
