"""SnapGen++ in MLX: text to image on Apple Silicon, one elastic network in three widths."""

from typing import TYPE_CHECKING

import mlx_snapgen._interrupts  # noqa: F401
from mlx_snapgen._blas import load_openblas
from mlx_snapgen._interrupts import interrupts_blocked
from mlx_snapgen._terminal import set_bar_size
from mlx_snapgen._version import __version__

if TYPE_CHECKING:
    from mlx_snapgen.pipeline import SnapGenPipeline

__all__ = ["OPENBLAS", "SnapGenPipeline", "__version__"]

set_bar_size()
with interrupts_blocked():  # the threads of both libraries would take it from `find_compiler`
    OPENBLAS = load_openblas()
    """Name of the OpenBLAS library that was loaded before mlx (Linux only), or None."""
    import numpy  # noqa: F401


def __getattr__(name: str):
    # Importing the pipeline imports mlx; `import mlx_snapgen` without it is instant.
    if name == "SnapGenPipeline":
        from mlx_snapgen.pipeline import SnapGenPipeline

        return SnapGenPipeline
    raise AttributeError(f"module 'mlx_snapgen' has no attribute '{name}'")
