"""Networks of other libraries in, and PyTorch and Core ML out."""

import mlx_snapgen  # noqa: F401  loads a fast BLAS, which must happen before mlx is imported
