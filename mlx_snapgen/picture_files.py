"""A picture's file -> an upright picture in 8-bit sRGB; its size, name and digest. No mlx."""

import functools
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.reading import open_regular

Size = tuple[int, int]
"""(height, width) in pixels."""

Source = str | Path | Image.Image
"""A picture's file, or a picture in memory."""

ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
OVER_WHITE = "transparent parts over white"
CONVERTED = "color profile converted to sRGB"
SCALED = "more than 8 bits, reduced to 8"

LARGE, MOST_IN_BYTE = 1 << 25, 1000
"""A picture of more pixels than `LARGE` has at most so many of them in a byte of its file."""

MAX_BYTES = 1 << 28
"""Of a picture's file."""

# Up to 179 million pixels are read without a word; Pillow refuses larger ones.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Unusable(Exception):
    """A picture that cannot be used.

    Attributes:
        reason: short; equal for all pictures with this mistake.
        detail: what is wrong with this picture, and what to do.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
"""Brands of photos of iPhones and other cameras, behind "ftyp" in the first bytes."""


@functools.cache
def has_heif_reader() -> bool:
    """Let Pillow read HEIC files with pillow-heif; False if it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def _open(data: bytes) -> Image.Image:
    is_heif = data[4:8] == b"ftyp" and data[8:12] in HEIF and b"avif" not in data[8:64]
    if is_heif and not has_heif_reader():
        raise Unusable("HEIC without pillow-heif", "a HEIC photo: run pip install pillow-heif")
    return Image.open(io.BytesIO(data))


def decode(data: bytes, *, keep_alpha: bool = False) -> tuple[Image.Image, list[str]]:
    """A picture in RGB, rotated by its EXIF tag, in sRGB, transparent parts over white.

    Args:
        keep_alpha: see `to_rgb`.

    Returns:
        the picture, and what had to be changed: few texts, to be counted.

    Raises:
        Unusable: not a picture, damaged, or too large.
    """
    return to_rgb(upright(data), keep_alpha=keep_alpha)


def upright(picture: bytes | Source) -> Image.Image:
    """A picture in its own mode, rotated by its EXIF tag; errors as of `decode` and `_read`."""
    if isinstance(picture, str | Path):
        picture = _read(picture)
    try:
        if isinstance(picture, Image.Image):
            return ImageOps.exif_transpose(picture)
        with _open(picture) as image:
            if image.width * image.height > max(LARGE, MOST_IN_BYTE * len(picture)):
                # A damaged header, or one that is to fill the memory.
                size = f"{image.width}x{image.height} pixels in {len(picture)} bytes"
                raise Unusable("damaged picture", f"cannot be read ({size})")
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unusable(error) from None


def header_size(data: bytes) -> Size:
    """The upright size of a picture, from its header alone; `data` may be the start of a file.

    Raises:
        Unusable: not a picture, or too large.
    """
    try:
        with _open(data) as image:
            # The PNG reader's own method would decode the whole picture to find the tag.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Some versions of Pillow swap them already.
                width, height = (int(image.tag_v2[tag]) for tag in (TIFF_WIDTH, TIFF_HEIGHT))
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise _unusable(error) from None


def _unusable(error: Exception) -> Unusable:
    # Pillow may raise an exception of any kind for a damaged file.
    if isinstance(error, Unusable):
        return error
    if isinstance(error, UnidentifiedImageError):
        text = "not a picture that can be read here; save it as PNG"
        return Unusable("not a picture that can be read", text)
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return Unusable("too many pixels", f"more than {most} pixels: make it smaller")
    why = " ".join(str(error).split()) or type(error).__name__
    return Unusable("damaged picture", f"cannot be read ({why})")


def to_rgb(image: Image.Image, *, keep_alpha: bool = False) -> tuple[Image.Image, list[str]]:
    """An upright picture of any mode in RGB; result and errors as of `decode`.

    Args:
        keep_alpha: a picture with transparent parts stays RGBA; else they are over white.
    """
    try:
        return _to_rgb(image, keep_alpha=keep_alpha)
    except Exception as error:
        raise _unusable(error) from None


def _to_rgb(image: Image.Image, *, keep_alpha: bool) -> tuple[Image.Image, list[str]]:
    notes = []
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
        notes.append(SCALED)
    alpha = None
    if image.has_transparency_data:
        alpha = image.convert("RGBA")
        image = image.convert("L") if image.mode == "LA" else alpha.convert("RGB")
        alpha = alpha.getchannel("A")
        # An opaque picture over white is itself.
        notes += [] if keep_alpha or alpha.getextrema() == (255, 255) else [OVER_WHITE]
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile and (transform := _transform(profile, image.mode)):
        image = ImageCms.applyTransform(image, transform) or image
        notes.append(CONVERTED)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        if keep_alpha:
            return image, notes
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    return image, notes


def _to_8_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip the values to 255.
    gray = np.asarray(image)
    if image.mode != "F":
        gray = gray.astype(np.int64) >> 8
    elif not np.isfinite(gray).all() or gray.min() < 0 or gray.max() > 1:
        raise Unusable("unknown range of values", "its values are not from 0 to 1; save it as PNG")
    else:
        gray = np.round(gray * 255)
    return Image.fromarray(gray.clip(0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it is sRGB, or none for pictures of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def picture_name(source: Source) -> str | None:
    """Name of the file, without its folder; None for a picture in memory."""
    return None if isinstance(source, Image.Image) else Path(source).name


def picture_hash(source: Source) -> str:
    """SHA-256 of the file's bytes; of a picture in memory, of its mode, size and pixels."""
    if not isinstance(source, Image.Image):
        return hashlib.sha256(_read(source)).hexdigest()
    head = f"{source.mode} {source.width} {source.height} ".encode()
    return hashlib.sha256(head + source.tobytes()).hexdigest()


def describe_picture(source: Source) -> dict[str, Any]:
    """How metadata names a picture."""
    return {"name": picture_name(source), "sha256": picture_hash(source)}


def picture_size(source: Source) -> Size:
    """The upright (height, width) in pixels; the pixels of a file are not read.

    Raises:
        UserError: no such file, not a picture, or too large.
    """
    try:
        if isinstance(source, Image.Image):
            image = upright(source)
            return image.height, image.width
        return header_size(_read(source))
    except Unusable as error:
        raise UserError(f"{source}: {error}") from None


def read_picture(source: Source, *, keep_alpha: bool = False) -> tuple[Image.Image, list[str]]:
    """A picture in RGB and sRGB, upright, transparent parts over white; what was changed.

    Args:
        keep_alpha: see `to_rgb`.

    Raises:
        UserError: no such file, not a picture, damaged, or too large.
    """
    try:
        return to_rgb(upright(source), keep_alpha=keep_alpha)
    except Unusable as error:
        raise UserError(f"{source}: {error}") from None


def _read(path: str | Path) -> bytes:
    path = expanded(path)
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"no picture {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES >> 20} MiB: give a smaller picture")
    return data
