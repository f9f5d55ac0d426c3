"""The contents of a picture's file -> an upright picture in 8-bit sRGB."""

import functools
import io
import warnings

import numpy as np
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

Size = tuple[int, int]
"""(height, width) in pixels."""

ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 256, 257
OVER_WHITE = "transparent parts over white"
CONVERTED = "color profile converted to sRGB"
SCALED = "more than 8 bits, reduced to 8"

# Up to 179 million pixels are read without a word; Pillow refuses larger ones.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Unusable(Exception):
    """A picture that cannot be used.

    Attributes:
        reason, detail: see `source.Skipped`.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes) -> tuple[Image.Image, list[str]]:
    """A picture in RGB, rotated by its EXIF tag, in sRGB, transparent parts over white.

    Returns:
        the picture, and what had to be changed: few texts, to be counted.

    Raises:
        Unusable: not a picture, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise _unusable(error) from None


def header_size(data: bytes) -> Size:
    """The upright size of a picture, from its header alone; `data` may be the start of a file.

    Raises:
        Unusable: not a picture, or too large.
    """
    size = _jpeg_size(data)
    if size is not None and size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or 0):
        return size
    try:
        with Image.open(io.BytesIO(data)) as image:
            # The PNG reader's own method would decode the whole picture to find the tag.
            turned = Image.Image.getexif(image).get(ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):
                # Some versions of Pillow swap them already.
                width, height = (int(image.tag_v2[tag]) for tag in (TIFF_WIDTH, TIFF_HEIGHT))
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise _unusable(error) from None


def _jpeg_size(data: bytes) -> Size | None:
    """The size of a JPEG without EXIF, which may turn it; None of other pictures.

    Most pictures of large sets are such. Pillow takes ten times as long.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[k : k + 2], "big") for k in (place + 5, place + 7))
            return (height, width) if height and width else None
        # 0xE1 and 0xED may hold EXIF or XMP; fill bytes and markers without a length are rare.
        if marker in (0xE1, 0xED, 0xFF) or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        place += 2 + length
    return None


def _unusable(error: Exception) -> Unusable:
    # Pillow may raise an exception of any kind for a damaged file.
    if isinstance(error, Unusable):
        return error
    if isinstance(error, UnidentifiedImageError):
        text = "not a picture that can be read here; save it as PNG"
        return Unusable("not a picture that can be read", text)
    if isinstance(error, Image.DecompressionBombError):
        return Unusable("too many pixels", " ".join(str(error).split()))
    why = " ".join(str(error).split()) or type(error).__name__
    return Unusable("damaged picture", f"cannot be read ({why})")


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
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
        notes.append(OVER_WHITE)
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if profile and (transform := _transform(profile, image.mode)):
        image = ImageCms.applyTransform(image, transform) or image
        notes.append(CONVERTED)
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
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
