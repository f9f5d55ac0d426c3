"""Functions that differ between desktops: clipboard, file manager, dark mode."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
