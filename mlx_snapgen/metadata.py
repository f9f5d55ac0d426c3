"""What a picture knows about its making: JSON in a PNG's text chunk `parameters`."""

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.text_encoders.base import normalize

KEY = "parameters"
"""The chunk's keyword, where picture viewers and other generators look for settings too."""


RECORDED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "few_step": (bool,),
    "attention_modulation": (bool,),
    "height": (int,),
    "width": (int,),
    "model": (str, type(None)),
    "revision": (str, type(None)),
    "model_width": (str,),
    "quantize": (int, type(None)),
    "loras": (list,),
    "text_encoders": (list, type(None)),
}
"""Settings that a picture is drawn again with, and what they are in its metadata."""

OLDER = {"loras": [], "few_step": False, "attention_modulation": False, "text_encoders": None}
"""What older pictures do not know of, and were drawn with."""


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The settings that a picture was made with; `UserError` when it carries none."""
    path = Path(path).expanduser()
    try:
        with Image.open(path) as image:
            kind, text = image.format, image.info.get(KEY)
    except FileNotFoundError:
        raise UserError(f"no picture {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from None
    if kind != "PNG":
        raise UserError(f"{path} is a {kind}: settings are kept in PNG pictures only")
    if text is None:
        raise UserError(f"{path} carries no settings: it was saved without them or edited since")
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or "mlx_snapgen" not in values:
        raise UserError(f"{path} carries the settings of another program")
    return values


def read_settings(path: str | Path) -> dict[str, Any]:
    """`read_metadata` with everything in `RECORDED` there and of its type.

    `loras` are (path, weight) pairs. `UserError` names what is missing or odd.
    """
    values = OLDER | read_metadata(path)
    try:
        values["loras"] = [(str(x["path"]), float(x["weight"])) for x in values["loras"]]
    except (TypeError, ValueError, LookupError):
        values["loras"] = None
    for key, kinds in RECORDED.items():
        if key not in values or not isinstance(values[key], kinds):
            raise UserError(f"{path} has no usable '{key}' in its settings")
    return values


def encode_png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A picture as PNG bytes, with `metadata` (JSON values) as its text chunk."""
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        # A text that Latin-1 cannot hold becomes an iTXt chunk by itself.
        chunks.add_text(KEY, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=chunks)
    return buffer.getvalue()


def save_picture(
    image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a PNG whole or not at all, never over another file.

    Missing folders are created. When `path` is taken, the first free one of `name-1.png`,
    `name-2.png`, ... is used, also when other processes write there.

    Returns:
        The path written.
    """
    path = Path(path)
    data = encode_png(image, metadata)
    try:
        for candidate in _numbered(path):
            if candidate.exists():
                continue
            try:
                with whole_file(candidate, replace=False) as partial:
                    partial.write_bytes(data)
            except FileExistsError:
                # Another process took the name meanwhile.
                continue
            return candidate
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    raise AssertionError("numbers do not end")


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 1
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def slug(prompt: str) -> str:
    """A file name out of a prompt: "A red apple!" -> "a-red-apple"."""
    words = "-".join(re.findall(r"\w+", normalize(prompt)))
    # Names are limited in bytes, and a letter may have several.
    short = words.encode()[:80].decode(errors="ignore").strip("-_")
    return short or "snapgen"
