"""Applications: a window and a server. In both, a worker process runs the model."""

import mlx_snapgen  # noqa: F401  (see `_interrupts`)
