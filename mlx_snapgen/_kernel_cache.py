"""A private folder for the kernels that MLX compiles on Linux.

MLX compiles kernels of the CPU into `<temporary folder>/mlx/<version>/cpu/*.so`, and loads a file
of that name if it is there. In /tmp every user of the computer can put one there, and its code
would run here (see .github/mlx-kernel-cache.txt). The only setting of that place is `TMPDIR`,
which MLX reads for each kernel, so that it must stay set. It is set by commands, the worker and
`SnapGenPipeline.from_pretrained`, and not by an import.
"""

import atexit
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

_made: Path | None = None


def make_private_cache() -> Path | None:
    """Let MLX keep its kernels in a folder that only this user can read or write.

    Sets `TMPDIR` for MLX, and keeps Python's own temporary files where they were. Call it before
    MLX compiles its first kernel. A further call changes nothing.

    Returns:
        The folder; None where MLX has no such cache (not Linux), or where no folder can be written.
        If the user's cache folder cannot be used, it is a new temporary folder.
    """
    global _made
    if not sys.platform.startswith("linux"):
        return None
    if _made is not None and os.environ.get("TMPDIR") == str(_made):
        return _made
    try:
        python_s_own = tempfile.gettempdir()
    except OSError:
        python_s_own = None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "mlx_snapgen" / "kernels"
    if not _make_private(folder):
        if python_s_own is None:
            return None
        folder = Path(tempfile.mkdtemp(prefix="mlx_snapgen-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tempfile.tempdir = python_s_own
    os.environ["TMPDIR"] = str(folder)
    _made = folder
    return folder


def _make_private(folder: Path) -> bool:
    """Whether `folder` is one of this user, with mode 0700, after an attempt to make it so."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in (folder.parent, folder):
            info = os.lstat(path)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                return False
            if info.st_mode & 0o077:
                # What is in it may be another user's.
                if path == folder and any(folder.iterdir()):
                    return False
                path.chmod(0o700)
        return os.access(folder, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        return False
