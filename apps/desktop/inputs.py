"""Files of the pictures and masks that drawings start from."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file
from mlx_snapgen.metadata import Recorded, encode_png
from mlx_snapgen.picture_files import MAX_BYTES, picture_hash
from mlx_snapgen.reading import check_size, open_regular
from mlx_snapgen.settings import DrawSettings


class Inputs:
    """A folder of pictures and masks that were no files before; the oldest are deleted.

    A file's name has the hash of its content, so that a file never changes.
    """

    def __init__(self, folder: Path, limit: int = 200):
        self.folder, self.limit = folder, limit

    def keep_picture(self, image: Image.Image, name: str) -> str:
        """The path of a file with this picture; `UserError` if it cannot be written."""
        return self._keep(name, encode_png(image))

    def keep_file(self, path: Path, name: str) -> str:
        """The path of a copy that stays when the history deletes `path`."""
        try:
            with open(path, "rb", opener=open_regular) as file:
                check_size(file, MAX_BYTES)
                return self._keep(name, file.read())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None

    def keep_mask(self, redrawn: Image.Image, size: tuple[int, int]) -> str:
        """The path of a mask in which the pixels to redraw are transparent.

        Args:
            redrawn: mode L, 255 where to redraw.
            size: (width, height) of the mask, which is that of its picture.
        """
        # One bit a pixel, which takes a fifth of the time of gray with alpha.
        mask = redrawn.point([level >= 128 for level in range(256)])
        mask = mask.resize(size, Image.Resampling.NEAREST)
        mask.putpalette([0, 0, 0, 255, 255, 255])
        buffer = io.BytesIO()
        mask.save(buffer, "png", bits=1, transparency=bytes([255, 0]))
        return self._keep("mask", buffer.getvalue())

    def _keep(self, name: str, data: bytes) -> str:
        path = self.folder / f"{name[:80]}-{hashlib.sha256(data).hexdigest()[:12]}.png"
        try:
            if path.exists():
                os.utime(path)
            else:
                with whole_file(path) as partial:
                    partial.write_bytes(data)
            files = sorted(self.folder.glob("*.png"), key=lambda p: p.stat().st_mtime)
            for old in files[: -self.limit]:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None
        return str(path)

    def found(
        self, recorded: Recorded, png: Path, *, known: Iterable[str]
    ) -> tuple[DrawSettings, str]:
        """The settings of a picture with the files that it was drawn from, by name and hash.

        Args:
            png: the picture; files beside it are tried too.
            known: paths of files that were used before.

        Returns:
            The settings without the files that were not found, and a line that names these, or "".
        """
        draw, missing = recorded.settings, []

        def path_of(value: Mapping[str, Any]) -> str | None:
            name = value["name"]
            if name is None:
                missing.append("a picture that was never a file")
                return None
            places = [png.parent / name, self.folder / name]
            for path in (*places, *(Path(p) for p in known if Path(p).name == name)):
                try:
                    if path.is_file() and picture_hash(path) == value["sha256"]:
                        return str(path)
                except (OSError, UserError):
                    continue
            missing.append(name)
            return None

        values = recorded.values
        image, mask = (
            path_of(values[name]) if values.get(name) else None for name in ("image", "mask")
        )
        edit = [path_of(value) for value in values.get("edit") or ()]
        draw = dataclasses.replace(
            draw,
            image=image,
            mask=None if image is None else mask,
            strength=None if image is None else draw.strength,
            edit=tuple(path for path in edit if path is not None),
        )
        if not missing:
            return draw, ""
        names = " and ".join(missing)
        return draw, f"{png.name} was drawn from {names}, not found: choose it under Start from"
