"""The size of a picture: the one asked for, the one drawn, and the one it is enlarged to."""

import math
import re
from dataclasses import dataclass

from apps.server.errors import RequestError
from apps.server.models import Served
from apps.server.reader import Reader
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.fitting import nearest_size
from mlx_snapgen.settings import check_size, trained_size, trained_sizes

MAX_UPSCALED = 1 << 22
"""Pixels of a picture that is enlarged with `upscale`."""


@dataclass(frozen=True)
class Size:
    """Sizes as (width, height) in pixels."""

    drawn: tuple[int, int]
    asked: tuple[int, int] | None = None
    """None: auto."""
    enlarged: tuple[int, int] | None = None
    """Of the answer, after drawing; None: as drawn."""

    def notices(self, model: Served) -> tuple[str, ...]:
        """What the client is to know about the size, if it is not the one that was asked for."""
        if self.asked in (None, self.enlarged or self.drawn):
            return ()
        drawn = "drawn at {}x{}".format(*self.drawn)
        if trained_sizes(model.config):
            drawn += f", the nearest size that {model.name} was trained on"
        elif self.asked is not None and any(side % model.config.size_unit for side in self.asked):
            drawn += f", the nearest size in multiples of {model.config.size_unit} pixels"
        if self.enlarged is not None:
            return (drawn + ", and enlarged to {}x{} in its own shape".format(*self.enlarged),)
        larger = _enlarged(self.drawn, self.asked) if _can_upscale(self.asked) else None
        if larger is not None:
            drawn += "; upscale enlarges it to {}x{}".format(*larger)
        return (drawn,)


def read_size(get: Reader, model: Served, *, most: int) -> Size:
    """The size of a request: that of the model's sizes with the nearest shape.

    Args:
        most: pixels of a picture that is enlarged; above, a smaller one is drawn.
    """
    text, upscale, config = get.text("size", 100), get.boolean("upscale"), model.config
    height, width = config.image_size
    if text in (None, "auto"):
        if upscale:
            message = "upscale needs the size to enlarge to, such as 1024x1024"
            raise RequestError(message, param="upscale")
        return Size((width, height))
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text) and not found:
        raise RequestError("the size has a side of more than 999999 pixels", param="size")
    if not found:
        raise RequestError(f"the size must be like {width}x{height}, or auto", param="size")
    asked = int(found[1]), int(found[2])
    # OpenAI's sizes are larger than those of a small model.
    unit = config.size_unit
    drawn = trained_size(config, asked[1], asked[0])
    drawn = max(unit, round(drawn[0] / unit) * unit), max(unit, round(drawn[1] / unit) * unit)
    if upscale:
        if not _can_upscale(asked):
            message = f"{text} is more than the {MAX_UPSCALED} pixels that upscale can have"
            raise RequestError(message, param="size")
        if math.prod(drawn) > most:
            drawn = nearest_size(drawn, pixels=height * width, unit=unit)
    height, width = drawn
    enlarged = _enlarged((width, height), asked) if upscale else None
    return Size((width, height), asked, enlarged)


def _can_upscale(asked: tuple[int, int]) -> bool:
    return math.prod(asked) <= MAX_UPSCALED


def _enlarged(drawn: tuple[int, int], asked: tuple[int, int]) -> tuple[int, int] | None:
    """The largest size of the shape of `drawn` within `asked`; None if it is not larger."""
    scale = min(most / side for most, side in zip(asked, drawn, strict=True))
    return (round(drawn[0] * scale), round(drawn[1] * scale)) if scale > 1 else None


def check_drawn(size: Size, config: Description, *, most: int) -> None:
    """`RequestError` for a size that the model cannot draw, or of more than `most` pixels."""
    width, height = size.drawn
    check_pixels(height, width, config, most=most)
    try:
        check_size(config, height, width)
    except UserError as error:
        raise RequestError(str(error), param="size") from None


def check_pixels(height: int, width: int, config: Description, *, most: int) -> None:
    """`RequestError` for more than `most` pixels."""
    if width * height > most:
        usual = "{1}x{0}".format(*config.image_size)
        raise RequestError(
            f"{width}x{height} is more than the {most} pixels allowed: use auto ({usual}), or "
            f"start the server with --max-pixels {width * height}",
            param="size",
        )
