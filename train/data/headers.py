"""Sizes of pictures from the first bytes of their files, without Pillow, which is ten times slower.

Only plain files are read here: those that Pillow would turn or might refuse are left to it.
"""

import zlib

from mlx_snapgen.picture_files import Size

PNG = b"\x89PNG\r\n\x1a\n"
PNG_COLORS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Color type -> its bits per channel."""
PNG_CHUNKS = {b"PLTE", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"bKGD", b"tRNS", b"pHYs", b"sBIT"}
"""Chunks before the pixels that cannot turn a picture, as EXIF and XMP in others can."""
WEBP_EXIF_XMP_OR_ANIMATION = 0x0E


def quick_size(data: bytes) -> Size | None:
    """(height, width) of a plain JPEG, PNG or WebP; None for Pillow to decide.

    Args:
        data: the start of the file, or all of it.
    """
    if data[:3] == b"\xff\xd8\xff":
        size = _jpeg_size(data)
    elif data[:8] == PNG:
        size = _png_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
    else:
        return None
    return size if size and size[0] and size[1] else None


def _jpeg_size(data: bytes) -> Size | None:
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[k : k + 2], "big") for k in (place + 5, place + 7))
            return height, width
        # 0xE1 and 0xED may hold EXIF or XMP; fill bytes and markers without a length are rare.
        if marker in (0xE1, 0xED, 0xFF) or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or length < 2:
            return None
        place += 2 + length
    return None


def _png_size(data: bytes) -> Size | None:
    header = data[12:29]
    if data[8:16] != b"\0\0\0\x0dIHDR" or zlib.crc32(header) != int.from_bytes(data[29:33], "big"):
        return None
    if header[12] not in PNG_COLORS.get(header[13], ()):
        return None
    place = 33
    while (kind := data[place + 4 : place + 8]) != b"IDAT":
        if kind not in PNG_CHUNKS:
            return None
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return int.from_bytes(header[8:12], "big"), int.from_bytes(header[4:8], "big")


def _webp_size(data: bytes) -> Size | None:
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8 " and not data[20] & 1 and data[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    elif kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8X" and not data[20] & WEBP_EXIF_XMP_OR_ANIMATION:
        width, height = (1 + int.from_bytes(data[k : k + 3], "little") for k in (24, 27))
    else:
        return None
    return height, width
