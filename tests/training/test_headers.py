"""Sizes from the first bytes of files agree with Pillow, or are left to it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from mlx_snapgen.picture_files import Unusable, header_size
from train.data.headers import quick_size

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(mode="RGB", size=(61, 47), kind="PNG", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


PLAIN = {
    "png": ("RGB", "PNG", {}),
    "png, gray": ("L", "PNG", {}),
    "png, palette": ("P", "PNG", {}),
    "png, bits": ("1", "PNG", {}),
    "png, alpha": ("RGBA", "PNG", {"dpi": (72, 72), "icc_profile": PROFILE}),
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg, gray": ("L", "JPEG", {"progressive": True}),
    "jpeg, cmyk": ("CMYK", "JPEG", {"icc_profile": PROFILE}),
    "webp": ("RGB", "WEBP", {}),
    "webp, lossless": ("RGBA", "WEBP", {"lossless": True}),
    "webp, alpha": ("RGBA", "WEBP", {}),
    "webp, profile": ("RGB", "WEBP", {"icc_profile": PROFILE}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files(name):
    mode, kind, options = PLAIN[name]
    for size in ((61, 47), (1, 300), (257, 2)):
        data = saved(mode, size, kind, **options)
        assert quick_size(data[:4096]) == (size[1], size[0]) == header_size(data)


def test_what_may_turn_a_picture_is_left_to_pillow():
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    for kind, options in (
        ("PNG", {"exif": exif}),
        ("PNG", {"pnginfo": text}),
        ("JPEG", {"exif": exif}),
        ("WEBP", {"exif": exif}),
        ("WEBP", {"xmp": b"<x/>"}),
        ("GIF", {}),
        ("TIFF", {}),
    ):
        assert quick_size(saved(kind=kind, **options)) is None, (kind, options)
    assert header_size(saved(exif=exif)) == (61, 47)


def png_header(**changes):
    values = {"width": 9, "height": 7, "bits": 8, "color": 2} | changes
    body = b"IHDR" + struct.pack(">IIBBBBB", *values.values(), 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + body + struct.pack(">I", zlib.crc32(body))
    return start + b"\0\0\0\x04IDAT"


def test_what_pillow_refuses_has_no_size():
    assert quick_size(png_header()) == (7, 9)
    for wrong in ({"bits": 3}, {"color": 5}, {"width": 0}):
        assert quick_size(png_header(**wrong)) is None, wrong
    damaged = bytearray(png_header())
    damaged[19] ^= 1
    assert quick_size(bytes(damaged)) is None
    for data in (b"", b"RIFF", b"RIFF\0\0\0\0WEBPVP8 ", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"):
        assert quick_size(data) is None


@pytest.mark.parametrize("name", PLAIN)
def test_damaged_starts_never_fail(name):
    mode, kind, options = PLAIN[name]
    data = saved(mode, kind=kind, **options)
    rng = np.random.default_rng(1)
    for length in range(0, min(200, len(data)), 3):
        changed = bytearray(data[:length])
        if length:
            changed[rng.integers(length)] ^= int(rng.integers(1, 256))
        for start in (data[:length], bytes(changed)):
            assert quick_size(start) is None or len(quick_size(start)) == 2
    with pytest.raises(Unusable):
        header_size(data[:10])
