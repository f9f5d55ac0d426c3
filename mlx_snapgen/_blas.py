"""Load OpenBLAS before the reference BLAS of mlx's Linux CPU wheel.

The wheel's own `cblas_sgemm` is a plain reference loop. A library loaded with `RTLD_GLOBAL` before
the first `import mlx` wins the symbol look-up, so loading OpenBLAS here makes every matrix product
on the CPU about fifty times faster. macOS (Accelerate) and CUDA do not need it.
"""

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

_NAMES = ("libopenblas.so.0", "libopenblas.so")
_loaded: Any = None
"""OpenBLAS, once it is loaded."""
_library: Any = None
"""The same, if its threads can be set for the whole process."""
_lock = threading.Lock()
_threads, _users = 1, 0
"""Of `one_blas_thread`: the threads outside of it, and how many are inside."""


def load_openblas() -> str | None:
    """Load OpenBLAS on Linux when it is installed.

    Returns the library's name, or None (not Linux, mlx already imported, none installed, or
    switched off with SNAPGEN_OPENBLAS=0).
    """
    global _library, _loaded
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    if os.environ.get("SNAPGEN_OPENBLAS") == "0":
        return None
    if "OPENBLAS_CORETYPE" not in os.environ and _has_avx512():
        # Older OpenBLAS releases detect new Xeons as Haswell and reach only half of their speed.
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _loaded = library
        # With OpenMP (2), each thread of the process has its own number of threads.
        if getattr(library, "openblas_get_parallel", int)() == 1:
            _library = library
        return name
    return None


def blas_version() -> str | None:
    """Version of the OpenBLAS that was loaded, None without one."""
    if _loaded is None:
        return None
    describe = _loaded.openblas_get_config
    describe.restype = ctypes.c_char_p
    found = re.search(r"\d+\.\d[\w.]*", text := describe().decode())
    return found[0] if found else text


def blas_threads() -> int:
    """Threads of a product outside of `one_blas_thread`; 1 if they cannot be set."""
    with _lock:
        return _threads if _users or _library is None else _library.openblas_get_num_threads()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, a product has one thread, also in other threads of the process."""
    global _threads, _users
    threads = blas_threads()
    with _lock:
        _threads, _users = threads, _users + 1
        _set_threads(1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _set_threads(_threads)


def _set_threads(count: int) -> None:
    if _library is not None:
        _library.openblas_set_num_threads(count)


def _has_avx512() -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith("flags")), "").split()
    except OSError:
        return False
    return {"avx512f", "avx512bw", "avx512vl"} <= set(flags)
