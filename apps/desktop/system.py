"""Functions that differ between desktops: clipboard, file manager, dark mode."""

import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageGrab

from mlx_snapgen.errors import UserError

MAC = sys.platform == "darwin"


def copy_picture(path: Path) -> None:
    """Put a PNG on the clipboard as a picture."""
    if MAC:
        # The path is an argument, not part of the script, so a file name cannot inject code.
        copy = "set the clipboard to (read (POSIX file (item 1 of argv)) as «class PNGf»)"
        lines = ("on run argv", copy, "end run")
        script = [part for line in lines for part in ("-e", line)]
        return _run(["osascript", *script, str(path)])
    if shutil.which("wl-copy") and _is_wayland():
        return _run(["wl-copy", "--type", "image/png"], path)
    if shutil.which("xclip"):
        return _run(["xclip", "-selection", "clipboard", "-target", "image/png"], path)
    raise UserError("copying pictures needs xclip (X11) or wl-clipboard (Wayland): install it")


def pasted_picture() -> Image.Image | Path | None:
    """The picture on the clipboard, or the file that was copied there; None without any.

    Raises:
        UserError: a program for that is missing.
    """
    if MAC:
        pasted = ImageGrab.grabclipboard()
        if isinstance(pasted, list):
            return Path(pasted[0]) if pasted else None
        return pasted
    if shutil.which("wl-paste") and _is_wayland():
        command = ["wl-paste", "--no-newline", "--type"]
    elif shutil.which("xclip"):
        command = ["xclip", "-selection", "clipboard", "-out", "-target"]
    else:
        raise UserError("pasting pictures needs xclip (X11) or wl-clipboard (Wayland): install it")
    try:
        if data := _output([*command, "image/png"]):
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return image.copy()
        copied = _output([*command, "text/uri-list"]).decode(errors="replace").split()
    except (OSError, SyntaxError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(f"the clipboard cannot be read: {error}") from None
    if copied and copied[0].startswith("file://"):
        return Path(unquote(urlsplit(copied[0]).path))
    return None


def accept_drops(window, dropped: Callable[[Path], None]) -> bool:
    """Call `dropped` with the first of the files that are dropped on the window.

    Returns:
        Whether that is possible: the package tkinterdnd2 is installed and has a library for this
        system.
    """
    from tkinter import TclError

    try:
        importlib.import_module("tkinterdnd2.TkinterDnD")._require(window)
        window.tk.call("tkdnd::drop_target", "register", str(window), "DND_Files")
    except (ImportError, RuntimeError, TclError):
        return False

    def drop(data: str) -> str:
        if files := window.tk.splitlist(data):
            # Later, so that the other program does not wait.
            window.after_idle(dropped, Path(files[0]))
        return "copy"

    # Tk knows no %D: tkdnd substitutes it.
    window.tk.call("bind", str(window), "<<Drop:DND_Files>>", f"{window.register(drop)} %D")
    return True


def reveal(path: Path) -> None:
    """Show a file in Finder, or its folder in the file manager."""
    if MAC:
        return _run(["open", "-R", str(path)])
    if not shutil.which("xdg-open"):
        raise UserError(f"no file manager found (xdg-open); the picture is {path}")
    return _run(["xdg-open", str(path.parent)])


def prefers_dark() -> bool:
    """Whether the desktop is in dark mode; False if that cannot be found out."""
    if MAC:
        command = ["defaults", "read", "-g", "AppleInterfaceStyle"]
    elif shutil.which("gsettings"):
        command = ["gsettings", "get", "org.gnome.desktop.interface", "color-scheme"]
    else:
        return False
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=2).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "dark" in answer.lower()


def _is_wayland() -> bool:
    return bool(os.environ.get("WAYLAND_DISPLAY"))


def _output(command: list[str]) -> bytes:
    """What a command prints; b"" if it fails."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=5,
        check=False,
    )
    return result.stdout if result.returncode == 0 else b""


def _run(command: list[str], stdin: Path | None = None) -> None:
    try:
        with open(stdin or "/dev/null", "rb") as source:
            # xclip and wl-copy keep running for the clipboard: their output must not be a pipe.
            subprocess.run(
                command,
                stdin=source,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=10,
                check=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{command[0]} failed: {error}") from None
