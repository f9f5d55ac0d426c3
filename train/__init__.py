"""Trainers of mlx_snapgen; run from a clone as `python -m train.NAME`."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While `python -m train.NAME` imports, Ctrl-C ends it at once; see `run_command`.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import mlx_snapgen  # noqa: F401  (before mlx, or MLX links its slow reference BLAS on Linux)
