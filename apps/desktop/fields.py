"""What the texts in the form's fields mean: numbers, sizes and models."""

import math
import re

from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.fitting import nearest_size
from mlx_snapgen.settings import BUILT_IN, ModelChoice, trained_size, trained_sizes

DEFAULT_MODEL = f"Default ({BUILT_IN})"
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Offered shapes of pictures, width : height."""


def read_number(name: str, text: str, *, kind: type, optional: bool = False):
    """`text` as a number; `UserError` names the field."""
    text = text.strip().replace(",", ".") if kind is float else text.strip()
    if not text and optional:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"the {name} must be {what}, not '{text}'")
    return value


def size_text(height: int, width: int) -> str:
    """A size as the form shows it."""
    return f"{width} × {height}"  # noqa: RUF001


def read_size(text: str) -> tuple[int, int] | tuple[None, None]:
    """The (height, width) that `size_text` wrote or the user typed, if any."""
    size = text.strip()
    if not size:
        return None, None
    found = re.search(r"(?<![0-9])([0-9]{1,9})\s*[x×*]\s*([0-9]{1,9})\s*$", size)  # noqa: RUF001
    if not found:
        raise UserError(f"the size '{size[:40]}' is not like 192 x 128 (width x height)")
    return int(found[2]), int(found[1])


def offered_sizes(config: Description) -> list[tuple[int, int]]:
    """The (height, width) that a model was trained on, or of `RATIOS` with its default area."""
    area, unit = math.prod(config.image_size), config.size_unit

    def side(ratio: float) -> int:
        return max(unit, round((area * ratio) ** 0.5 / unit) * unit)

    sizes = [(side(down / across), side(across / down)) for across, down in RATIOS]
    return list(dict.fromkeys(trained_sizes(config) or sizes))


def like_picture(config: Description, size: tuple[int, int], *, pixels: int) -> tuple[int, int]:
    """The (height, width) with about a picture's aspect ratio that a model draws.

    Args:
        size: (height, width) of the picture.
        pixels: wanted, unless the model was trained on certain sizes.
    """
    if config.trained_sizes:
        return trained_size(config, *size)
    return nearest_size(size, pixels=pixels, unit=config.size_unit)


def size_label(width: int, height: int) -> str:
    """A size, with the ratio that it has."""
    kind = "Square" if width == height else "Landscape" if width > height else "Portrait"
    divisor = math.gcd(width, height)
    ratio = f" {width // divisor}:{height // divisor}"
    for across, down in RATIOS:
        if width * down != height * across and abs(width * down / (height * across) - 1) < 0.03:
            ratio = f", about {across}:{down}"
    shown = kind if width == height else kind + ratio
    return f"{shown}: {size_text(height, width)}"


def model_label(choice: ModelChoice) -> str:
    """How the form names a model."""
    if choice.model is None:
        return DEFAULT_MODEL
    name = choice.model if choice.base is None else f"{choice.model} {choice.base}"
    return name + ("" if choice.revision is None else f"@{choice.revision}")


def read_model(text: str) -> tuple[str | None, str | None, str | None]:
    """Model, revision and base that `model_label` wrote or the user typed."""
    name = text.strip()
    if name in ("", DEFAULT_MODEL):
        return None, None, None
    file, is_file, rest = name.partition(".safetensors ")
    source, revision = rest.strip() if is_file else name, None
    if "@" in source and not expanded(source).is_dir():
        source, _, revision = source.rpartition("@")
    if is_file:
        return f"{file}{is_file.strip()}", revision or None, source
    return source, revision or None, None
