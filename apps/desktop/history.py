"""The latest pictures, as PNG files in a folder."""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mlx_snapgen.alpha import shown
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.reading import open_regular

THUMBNAIL = 84
"""Pixels of the longer side."""
MAX_PIXELS = 1 << 26
"""Of a picture to show."""


@dataclass(frozen=True)
class Entry:
    path: Path

    @property
    def name(self) -> str:
        """File name to save the picture as, without ending."""
        return re.sub(r"^\d+-\d+_", "", self.path.stem) or "snapgen"


class History:
    """At most `limit` files; the oldest are deleted. Used by one thread at a time."""

    def __init__(self, folder: Path, limit: int = 100):
        self.folder, self.limit = folder, limit
        self.skipped: list[str] = []
        """Names of the files that `load` could not read."""

    def paths(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("[0-9]*-[0-9]*_*.png"), reverse=True)

    def load(self) -> Iterator[tuple[Entry, Image.Image]]:
        """All entries with their thumbnails, the newest first; damaged files are skipped."""
        for path in self.paths():
            try:
                small = thumbnail(open_image(path))
            except UserError:
                self.skipped.append(path.name)
                continue
            yield Entry(path), small

    def add(self, name: str, png: bytes) -> Entry:
        """Add a picture; raises OSError."""
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"{int(now % 1 * 1e6):06d}"
        path = self.folder / f"{stamp}_{name}.png"
        with whole_file(path) as partial:
            partial.write_bytes(png)
        for old in self.paths()[self.limit :]:
            with contextlib.suppress(OSError):  # a folder of such a name
                old.unlink()
        return Entry(path)

    def delete(self, entry: Entry) -> None:
        """Delete a picture and its file."""
        entry.path.unlink(missing_ok=True)


def open_image(path: Path) -> Image.Image:
    """The pixels of a picture to show, RGB; `UserError` for a file that cannot be shown."""
    path = expanded(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open(path, "rb", opener=open_regular) as file, Image.open(file) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                return shown(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"cannot show {path.name}: {reason}") from None


def thumbnail(image: Image.Image) -> Image.Image:
    """A small copy, `THUMBNAIL` pixels on its longer side."""
    scale = THUMBNAIL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
