"""The settings inside a picture: JSON in a PNG's text chunk `parameters`.

The fields of `DrawSettings` and `ModelChoice` are recorded, except a few that do not affect a
picture. A new setting is a new field there; its default, or its value in `OLDER`, is how pictures
without it were drawn. `SnapGenPipeline.describe` adds versions, device and dtype.
"""

import contextlib
import dataclasses
import io
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, PngImagePlugin

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.settings import DrawSettings, ModelChoice, read_fields

KEY = "parameters"
"""The chunk's keyword, which picture viewers and other generators use too."""

REQUIRED = (
    *("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"),
    *("height", "width", "model", "revision", "model_width", "quantize"),
)
"""Fields that every picture has. Fields that were added later are optional: their defaults must be
the behavior of the versions without them."""

OLDER = {"few_step": False}
"""Values of missing fields whose default is not the behavior of older versions."""


class Recorded(NamedTuple):
    """How a picture was drawn."""

    settings: DrawSettings
    choice: ModelChoice
    values: dict[str, Any]
    """All of its metadata, also versions, device and dtype."""


def record_settings(settings: DrawSettings) -> dict[str, Any]:
    """The metadata of resolved settings. Each picture has its own seed, so there is no count."""
    values = dataclasses.asdict(settings)
    del values["num_images"]
    return values


def record_choice(choice: ModelChoice) -> dict[str, Any]:
    """The metadata of a model: everything that affects pictures."""
    values = dataclasses.asdict(choice)
    del values["keep_text_encoders"]
    values["loras"] = [{"path": str(path), "weight": float(w)} for path, w in choice.loras]
    values["text_encoders"] = choice.text_encoders and list(choice.text_encoders)
    return values


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a picture; `UserError` if it has none."""
    path = expanded(path)
    try:
        with Image.open(path) as image:
            kind, text = image.format, image.info.get(KEY)
    except FileNotFoundError:
        raise UserError(f"no picture {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from None
    if kind != "PNG":
        raise UserError(f"{path} is a {kind}: only PNG pictures carry settings")
    if text is None:
        raise UserError(f"{path} carries no settings: it was saved without them, or edited later")
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or "mlx_snapgen" not in values:
        raise UserError(f"{path} carries the settings of another program")
    return values


def read_settings(path: str | Path) -> Recorded:
    """The settings in a picture's metadata; `UserError` names one that is missing or damaged."""
    metadata = read_metadata(path)
    values: dict[str, Any] = OLDER | metadata
    # The model and its mode determine the shift.
    values.pop("time_shift", None)
    with contextlib.suppress(TypeError, LookupError):
        values["loras"] = [[lora["path"], lora["weight"]] for lora in values["loras"]]
    settings, choice = (read_fields(kind, values) for kind in (DrawSettings, ModelChoice))
    fields = {f.name for kind in (DrawSettings, ModelChoice) for f in dataclasses.fields(kind)}
    for name in (*REQUIRED, *values):
        empty = name in settings and settings[name] is None
        if empty or (name in fields and name not in settings | choice):
            raise UserError(f"{path} has no usable '{name}' in its settings")
    return Recorded(DrawSettings(**settings), ModelChoice(**choice), metadata)


def encode_png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A picture as PNG bytes, with `metadata` (JSON values) as its text chunk."""
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        # Pillow writes a text that is not Latin-1 as an iTXt chunk.
        chunks.add_text(KEY, json.dumps(metadata, ensure_ascii=False))
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=chunks)
    return buffer.getvalue()


def save_picture(
    image: Image.Image, path: str | Path, *, metadata: Mapping[str, Any] | None = None
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
                # Another process has just created this file.
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
    """A file name made of a prompt: "A red apple!" -> "a-red-apple"."""
    words = "-".join(re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower()))
    # Names are limited in bytes, and a letter may have several.
    short = words.encode()[:80].decode(errors="ignore").strip("-_")
    return short or "snapgen"
