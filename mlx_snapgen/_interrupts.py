"""Ctrl-C ends `python -m` while it imports a command of this project; imported before all else.

Nor is it lost when MLX first compiles for the CPU: it runs `system("g++ --version")`, during which
the C library ignores SIGINT. A blocked signal is kept, if all threads of the process block it.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

PACKAGES = "mlx_snapgen", "train", "convert", "apps"


def end_imports_at_interrupt() -> None:
    """Until `run_command` sets Python's handler again, Ctrl-C ends a command without a traceback.

    Programs of others that import this package keep their handler.
    """
    arguments = sys.orig_argv[1:]
    if sys.argv[0] != "-m" or "-m" not in arguments[:-1]:
        return
    name = arguments[arguments.index("-m") + 1].partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    # Installed, the packages of others are in the same folder.
    is_ours = name in PACKAGES and _parent(file) == _parent(__file__)
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """In the block Ctrl-C waits for its end, on Linux; threads that start in it never get it."""
    if not sys.platform.startswith("linux"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """In the block Ctrl-C waits for its end, for imports that break or crash if it ends them."""
    before, kept = signal.getsignal(signal.SIGINT), []
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *arguments: kept.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if kept:
            before(*kept[0])


def find_compiler() -> None:
    """Let MLX look for its compiler, which it does once in a process, while Ctrl-C waits."""
    import mlx.core as mx

    if sys.platform.startswith("linux") and mx.default_device().type == mx.DeviceType.cpu:
        with interrupts_blocked():
            mx.compile(lambda x: x)(mx.array(0))


def _parent(file: str) -> str:
    """The folder that has the package of a file."""
    return os.path.dirname(os.path.dirname(os.path.abspath(file)))


end_imports_at_interrupt()
