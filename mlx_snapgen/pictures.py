"""Arrays to 8-bit pictures and back, PSNR, and contact sheets."""

import math
import textwrap
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw

from mlx_snapgen.alpha import checkerboard, over
from mlx_snapgen.errors import UserError


def to_uint8(pictures: mx.array) -> np.ndarray:
    """Decoded pictures (..., H, W, C), about [-1, 1] -> uint8.

    Raises:
        UserError: values that are not finite.
    """
    if not mx.isfinite(pictures).all().item():
        raise UserError(
            "the decoded pictures are not finite: the model is damaged, or its training diverged"
        )
    return np.array(mx.round((mx.clip(pictures, -1, 1) + 1) * 127.5).astype(mx.uint8))


def from_uint8(pictures: np.ndarray) -> mx.array:
    """uint8 pictures (..., H, W, C) -> float32 in [-1, 1]."""
    return mx.array(pictures).astype(mx.float32) / 127.5 - 1


def decibels(mean_squared_error: float, peak: float) -> float:
    """Peak signal-to-noise ratio in dB; infinite if the error is 0."""
    if mean_squared_error == 0:
        return math.inf
    return float(10 * np.log10(peak**2 / mean_squared_error))


def psnr(found: np.ndarray, expected: np.ndarray, *, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB of two arrays of one shape; `peak` is 255 for uint8."""
    return decibels(float(np.mean((found.astype(np.float64) - expected) ** 2)), peak)


def contact_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int
) -> Image.Image:
    """Pictures (H, W, C) of one size in rows of `columns`, each over its caption.

    A fourth channel is alpha, and the colors are times alpha; they are shown on a checkerboard.
    """
    (height, width), margin, line = pictures[0].shape[:2], 6, 11
    chars = max(width // 6, 8)
    wrapped = [textwrap.wrap(text, chars, max_lines=4, placeholder="...") for text in captions]
    lines = max(len(text) for text in wrapped)
    cell_width, cell_height = width + margin, height + margin + line * lines
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (245, 245, 245))
    drawing = ImageDraw.Draw(sheet)
    for k, (picture, text) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = k % columns * cell_width, k // columns * cell_height
        flat = over(picture, checkerboard(height, width))
        sheet.paste(Image.fromarray(flat), (x, y))
        drawing.multiline_text((x + 2, y + height), "\n".join(text), fill="black", spacing=0)
    return sheet
