"""Pictures that a drawing starts from, fitted to its size. No mlx."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size, Source, Unusable, read_picture, to_rgb, upright

FITS = ("crop", "pad", "stretch")
"""How a picture gets another aspect ratio: cut around its center, with bars (white, or
transparent if it has alpha), or distorted."""

MAX_REFERENCE = 1 << 20
"""Pixels of a picture to edit; larger ones are scaled."""

MAX_RATIO = 8
"""Of the sides of a size that is chosen here."""


class Fitted(NamedTuple):
    """A picture in the size of a drawing."""

    image: Image.Image
    """RGB, or RGBA if alpha is kept."""
    changes: list[str]
    """What had to be changed, for a notice; empty if nothing."""


def nearest_size(size: Size, *, pixels: int, unit: int) -> Size:
    """The (height, width) in multiples of `unit` that is nearest to a picture's aspect ratio.

    Args:
        size: of the picture.
        pixels: wanted height x width. An error of the ratio counts twice as much as the same
            error of this.
    """
    ratio, area = size[0] / size[1], max(1.0, pixels / unit**2)
    ratio = min(max(ratio, 1 / MAX_RATIO), MAX_RATIO)
    found = []
    for rows in range(1, math.ceil(2 * math.sqrt(area * max(ratio, 1))) + 1):
        for columns in {max(1, math.floor(rows / ratio)), math.ceil(rows / ratio)}:
            errors = math.log(rows / columns / ratio), math.log(rows * columns / area)
            found.append((abs(errors[0]) + abs(errors[1]) / 2, rows, columns))
    _, rows, columns = min(found)
    return rows * unit, columns * unit


def fit(picture: Image.Image, size: Size, *, how: str, is_mask: bool = False) -> Image.Image:
    """A picture in another size (see `FITS`).

    Args:
        size: (height, width) in pixels.
        is_mask: a mask is not blurred, and its bars are black.
    """
    height, width = size
    if picture.size == (width, height):
        return picture
    filter_ = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
    across, down = width / picture.width, height / picture.height
    if how == "crop":
        scale = max(across, down)
        left = (picture.width - width / scale) / 2
        top = (picture.height - height / scale) / 2
        box = (left, top, picture.width - left, picture.height - top)
        return picture.resize((width, height), filter_, box=box)
    if how == "stretch":
        return picture.resize((width, height), filter_)
    scale = min(across, down)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    ground = "black" if is_mask else "white" if picture.mode == "RGB" else (0, 0, 0, 0)
    whole = Image.new(picture.mode, (width, height), ground)
    place = (width - inner[0]) // 2, (height - inner[1]) // 2
    whole.paste(picture.resize(inner, filter_), place)
    return whole


def fitted_picture(source: Source, size: Size, *, how: str, keep_alpha: bool = False) -> Fitted:
    """A picture to start from, in the (height, width) of the drawing.

    Args:
        keep_alpha: see `picture_files.to_rgb`.
    """
    image, changes = read_picture(source, keep_alpha=keep_alpha)
    fitted = fit(image, size, how=how)
    ground = " with white" if image.mode == "RGB" else ""
    words = {"crop": "cut", "pad": f"padded{ground}", "stretch": "stretched"}
    return _noted(image, fitted, word=words[how], changes=changes)


def fitted_reference(source: Source, *, unit: int) -> Fitted:
    """A picture to edit; see `fit_reference`."""
    image, changes = read_picture(source)
    return _noted(image, fit_reference(image, unit=unit), word="cut", changes=changes)


def _noted(image: Image.Image, fitted: Image.Image, *, word: str, changes: list[str]) -> Fitted:
    """`fitted`, and how it was made from `image`: `word` if that took more than scaling."""
    (w, h), (width, height) = image.size, fitted.size
    if image.size != fitted.size:
        word = "scaled" if w * height == h * width else word
        changes = [f"{word} from {w}x{h} to {width}x{height} pixels", *changes]
    return Fitted(fitted, changes)


def fitted_mask(source: Source, size: Size, *, how: str) -> np.ndarray:
    """Which pixels to redraw: (H, W), true or false, in the (height, width) of the drawing.

    Transparent pixels are redrawn (as in OpenAI's API). In a mask without any, white ones are.

    Raises:
        UserError: as `read_picture`, or the mask selects nothing.
    """
    try:
        mask = upright(source)
        chosen = None
        if mask.has_transparency_data:
            alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
            chosen = alpha < 128 if (alpha < 128).any() else None
        if chosen is None:
            chosen = np.asarray(to_rgb(mask)[0].convert("L")) >= 128
    except Unusable as error:
        raise UserError(f"{source}: {error}") from None
    drawn = fit(Image.fromarray(chosen.astype(np.uint8) * 255), size, how=how, is_mask=True)
    redrawn = np.asarray(drawn) > 0
    if not redrawn.any():
        raise UserError(
            "the mask selects nothing to redraw: make these pixels transparent, or white in a "
            "picture without transparent ones"
        )
    return redrawn


def check_reference(height: int, width: int) -> None:
    """`UserError` for a picture to edit of which a side is too short for FLUX.2."""
    if min(width, height) < 64 or max(width, height) > 8 * min(width, height):
        raise UserError(
            f"a picture of {width}x{height} pixels cannot be edited: both sides must be at least "
            "64 pixels, and one at most 8 times the other"
        )


def fit_reference(picture: Image.Image, *, unit: int) -> Image.Image:
    """A picture to edit in a size that FLUX.2 takes, as in diffusers' Flux2KleinPipeline.

    A picture of more than `MAX_REFERENCE` pixels is made smaller. Its sides are then cut around the
    center to multiples of `unit`.

    Raises:
        UserError: see `check_reference`.
    """
    width, height = picture.size
    check_reference(height, width)
    if width * height > MAX_REFERENCE:
        scale = math.sqrt(MAX_REFERENCE / (width * height))
        size = int(width * scale), int(height * scale)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    kept = [side // unit * unit for side in picture.size]
    left, top = ((side - cut) // 2 for side, cut in zip(picture.size, kept, strict=True))
    return picture.crop((left, top, left + kept[0], top + kept[1]))
