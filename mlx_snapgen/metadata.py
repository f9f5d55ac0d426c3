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
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, is_unicode, whole_file
from mlx_snapgen.picture_files import describe_picture, picture_hash
from mlx_snapgen.reading import open_regular
from mlx_snapgen.settings import (
    BUILT_IN,
    FORMER,
    MAX_SEED,
    MAX_STEPS,
    WIDTH_NAMES,
    DrawSettings,
    ModelChoice,
    read_fields,
)

KEY = "parameters"
"""The chunk's keyword, which picture viewers and other generators use too."""

MAX_TEXT = 1 << 20
"""Bytes of the chunk that are read."""

REQUIRED = (
    *("prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale"),
    *("height", "width", "model", "revision", "model_width", "quantize"),
)
"""Fields that every picture has. Fields that were added later are optional: their defaults must be
the behavior of the versions without them."""

RANGES = {
    "seed": (0, MAX_SEED),
    "height": (1, 1 << 20),
    "width": (1, 1 << 20),
    "num_inference_steps": (1, MAX_STEPS),
    "guidance_scale": (-1e6, 1e6),
    "quantize": (0, 8),
    "strength": (0, 1),
}
"""Field -> smallest and largest value in a picture."""
MAX_PIXELS = 1 << 22
"""Height x width that a picture's settings may ask for; options may ask for more."""
MAX_PROMPT, MAX_NAME, MAX_NAMES = 10_000, 1000, 64
"""Characters of prompts, characters of other texts, and LoRAs or text encoders in a picture."""

DESCRIBED = {"mlx_snapgen", "mlx", "device", "dtype"}
"""Texts about the program that drew, see `SnapGenPipeline.describe`."""

PICTURES = {"image", "mask", "edit"}
"""Fields that are pictures: recorded by name and hash."""

OLDER = {"few_step": False, "force_size": True}
"""Values of missing fields whose default is not the behavior of older versions."""


class Recorded(NamedTuple):
    """How a picture was drawn."""

    settings: DrawSettings
    choice: ModelChoice
    values: dict[str, Any]
    """All of its metadata, also versions, device and dtype."""


def record_settings(settings: DrawSettings) -> dict[str, Any]:
    """The metadata of resolved settings. Each picture has its own seed, so there is no count.

    Of pictures to start from, it has the name and the hash.
    """
    values = dict(vars(settings))
    del values["num_images"], values["batch_size"]
    pictures = {name: values.pop(name) for name in ("image", "mask", "edit")}
    if settings.image is None:
        del values["strength"], values["fit"]
    for name, value in pictures.items():
        if name == "edit" and value:
            values[name] = [describe_picture(source) for source in value]
        elif name != "edit" and value is not None:
            values[name] = describe_picture(value)
    return values


def record_choice(choice: ModelChoice) -> dict[str, Any]:
    """The metadata of a model: everything that affects pictures."""
    values = dataclasses.asdict(choice)
    del values["keep_text_encoders"], values["low_memory"]
    values["loras"] = [{"path": str(path), "weight": float(w)} for path, w in choice.loras]
    values["text_encoders"] = choice.text_encoders and list(choice.text_encoders)
    return values


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a picture; `UserError` if it has none. Its pixels are not read."""
    path = expanded(path)
    try:
        with open(path, "rb", opener=open_regular) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                kind = image.format
            text = _text(file) if kind == "PNG" else None
    except FileNotFoundError:
        raise UserError(f"no picture {path}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not a readable picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} is not a readable picture: {reason}") from None
    if kind != "PNG":
        raise UserError(f"{path} is a {kind}: only PNG pictures carry settings")
    if text is None:
        raise UserError(f"{path} carries no settings: it was saved without them, or edited later")
    try:
        # `read_settings` names the values that are out of range.
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or "mlx_snapgen" not in values:
        raise UserError(f"{path} carries the settings of another program")
    return values


def _text(file: BinaryIO) -> str | None:
    """The text of a PNG's last chunk of keyword `KEY`: tEXt, zTXt or iTXt, before or after the
    pixels (PNG specification, 11.3.3). None without one; ValueError for a damaged one."""
    found = None
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(size + 4, io.SEEK_CUR)
            continue
        data = file.read(min(size, MAX_TEXT + 256))
        keyword, _, rest = data.partition(b"\0")
        if keyword != KEY.encode():
            file.seek(size - len(data) + 4, io.SEEK_CUR)
            continue
        if len(data) < size:
            raise ValueError(f"its settings are damaged or larger than {MAX_TEXT} bytes")
        if int.from_bytes(file.read(4), "big") != zlib.crc32(kind + data):
            raise ValueError("its settings are damaged")
        compressed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
        if kind == b"zTXt":
            rest = rest[1:]
        elif kind == b"iTXt":
            # Compression flag and method, language, translated keyword.
            *_, rest = rest[2:].split(b"\0", 2)
        if compressed:
            try:
                rest = zlib.decompressobj().decompress(rest, MAX_TEXT + 1)
            except zlib.error as error:
                raise ValueError(f"its settings are damaged: {error}") from None
        if len(rest) > MAX_TEXT:
            raise ValueError(f"its settings are larger than {MAX_TEXT} bytes")
        found = rest.decode("utf-8" if kind == b"iTXt" else "latin-1")
    return found


def read_settings(path: str | Path, *, max_pixels: int | None = MAX_PIXELS) -> Recorded:
    """The settings in a picture's metadata.

    The picture may be a stranger's: see `foreign` before you load the model that it names. The
    settings name pictures to start from without their folders: see `find_pictures`.

    Args:
        max_pixels: most pixels that the settings may ask for; None: any number.

    Raises:
        UserError: names a setting that is missing, damaged or out of range.
    """
    metadata = read_metadata(path)
    values: dict[str, Any] = OLDER | metadata
    # The model and its mode determine the shift.
    values.pop("time_shift", None)
    if values.get("model") is None and values.get("model_name") in FORMER:
        values["model"] = values["model_name"]
    with contextlib.suppress(TypeError, LookupError):
        values["loras"] = [[lora["path"], lora["weight"]] for lora in values["loras"]]
    for name in PICTURES & values.keys():
        value = values[name]
        several = isinstance(value, list)
        values[name] = [_name(one) for one in value] if several else _name(value)
    settings, choice = (read_fields(kind, values) for kind in (DrawSettings, ModelChoice))
    fields = {f.name for kind in (DrawSettings, ModelChoice) for f in dataclasses.fields(kind)}
    for name in (*REQUIRED, *values):
        empty = name in settings and settings[name] is None
        wrong = not _in_range(name, (settings | choice).get(name))
        wrong |= name in DESCRIBED and not isinstance(values[name], str)
        if empty or wrong or (name in fields and name not in settings | choice):
            raise UserError(f"{path} has no usable '{name}' in its settings")
    height, width = settings["height"], settings["width"]
    if max_pixels is not None and height * width > max_pixels:
        raise UserError(
            f"the settings in {path} ask for {width} x {height}, which is more than {max_pixels} "
            "pixels: choose both height and width yourself"
        )
    return Recorded(DrawSettings(**settings), ModelChoice(**choice), metadata)


def _name(value: Any) -> Any:
    """The name in the metadata of a picture, "" for none; None: it is damaged."""
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
        return None
    return value.get("name") or ""


def find_pictures(
    recorded: Recorded, path: str | Path, *, given: Collection[str] = ()
) -> DrawSettings:
    """The recorded settings with the files of the pictures to start from.

    A file is looked for beside the PNG at `path` and in the current folder, by its name and hash.

    Args:
        given: fields of which the user gives other pictures.

    Raises:
        UserError: a picture was not found; names the option for it.
    """
    options = {"image": "--image FILE STRENGTH", "mask": "--mask FILE", "edit": "--edit FILE ..."}
    settings = recorded.settings
    for name, option in options.items():
        value = recorded.values.get(name)
        if name in given or value is None:
            continue
        found = [
            _find_picture(one, Path(path).parent, option=option, png=path)
            for one in (value if isinstance(value, list) else [value])
        ]
        picture = tuple(found) if name == "edit" else found[0]
        settings = dataclasses.replace(settings, **{name: picture})
    return settings


def _find_picture(value: Mapping[str, Any], folder: Path, *, option: str, png: str | Path) -> str:
    name, others = str(value.get("name") or ""), False
    for place in (folder, Path()) if name else ():
        if (place / name).is_file():
            if picture_hash(place / name) == value["sha256"]:
                return str(place / name)
            others = True
    what = f"from {name}" if name else "from a picture that was never a file"
    why = "which has changed since" if others else "which is not here"
    why = f", {why}" if name else ""
    raise UserError(f"{png} was drawn {what}{why}: give it with {option}")


def _in_range(name: str, value: Any) -> bool:
    """Whether a setting of the right type has a value that can be used; None can."""
    if name in RANGES and value is not None:
        least, most = RANGES[name]
        return least <= value <= most
    if name == "model_width" and value is not None:
        return value in WIDTH_NAMES
    if name in ("prompt", "negative_prompt"):
        return len(value or "") <= MAX_PROMPT and is_unicode(value or "")
    names = value if isinstance(value, tuple) else (value,)
    if name in PICTURES and any(text != Path(text or "").name for text in names):
        return value is None
    if name == "loras":
        if not all(abs(weight) <= 1e6 for _, weight in value or ()):
            return False
        names = [path for path, _ in value or ()]
    texts = [text for text in names if isinstance(text, str)]
    return len(texts) <= MAX_NAMES and all(
        len(text) <= MAX_NAME and text.isprintable() for text in texts
    )


def foreign(recorded: ModelChoice, used: ModelChoice) -> str:
    """The model, revision and LoRAs of a picture that are not those in use, as text; "" if none."""
    parts = []
    if recorded.model != used.model:
        parts.append(f"the model {recorded.model or BUILT_IN}")
    if recorded.base is not None and recorded.base != used.base:
        parts.append(f"the base {recorded.base}")
    if recorded.revision is not None and recorded.revision != used.revision:
        parts.append(f"revision {recorded.revision[:12]}")
    files = [path for path, _ in used.loras]
    parts += [f"the LoRA {path}" for path, _ in recorded.loras if path not in files]
    text = ", ".join(parts)
    return text if len(text) <= 200 else text[:199] + "…"


def encode_png(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A picture as PNG bytes, with `metadata` (JSON values) as its text chunk."""
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        # The name of a file may have bytes that are no text.
        text = json.dumps(metadata, ensure_ascii=False).encode(errors="replace").decode()
        # Pillow writes a text that is not Latin-1 as an iTXt chunk.
        chunks.add_text(KEY, text)
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
    text = unicodedata.normalize("NFKC", prompt)
    # An emoji has a name: "red apple".
    text = "".join(
        f" {unicodedata.name(c, '')} " if unicodedata.category(c) == "So" else c for c in text
    )
    words = "-".join(re.findall(r"\w+", text.lower()))
    # Names are limited in bytes, and a letter may have several.
    short = words.encode()[:80].decode(errors="ignore").strip("-_")
    return short or "snapgen"
