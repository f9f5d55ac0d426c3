"""Load OpenBLAS before the reference BLAS of mlx's Linux CPU wheel.

The wheel's own `cblas_sgemm` is a plain reference loop. A library loaded with `RTLD_GLOBAL` before
the first `import mlx` wins the symbol look-up, so loading OpenBLAS here makes every matrix product
on the CPU about fifty times faster. macOS (Accelerate) and CUDA do not need it.
"""

import ctypes
import os
import sys

_NAMES = ("libopenblas.so.0", "libopenblas.so")


def load_openblas() -> str | None:
    """Load OpenBLAS on Linux when it is installed.

    Returns the library's name, or None (not Linux, mlx already imported, none installed, or
    switched off with SNAPGEN_OPENBLAS=0).
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    if os.environ.get("SNAPGEN_OPENBLAS") == "0":
        return None
    if "OPENBLAS_CORETYPE" not in os.environ and _has_avx512():
        # Older OpenBLAS releases detect new Xeons as Haswell and reach only half of their speed.
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    for name in _NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512vl"} <= set(flags)
