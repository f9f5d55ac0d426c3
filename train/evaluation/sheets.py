"""Contact sheets."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int) -> Image.Image:
    """Pictures (H, W, 3) of one size in rows of `columns`, each over its caption."""
    (height, width), margin, line = pictures[0].shape[:2], 6, 11
    chars = max(width // 6, 8)
    wrapped = [textwrap.wrap(text, chars)[:4] for text in captions]
    lines = max(len(text) for text in wrapped)
    cell_width, cell_height = width + margin, height + margin + line * lines
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), (245, 245, 245))
    drawing = ImageDraw.Draw(sheet)
    for k, (picture, text) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = k % columns * cell_width, k // columns * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        drawing.multiline_text((x + 2, y + height), "\n".join(text), fill="black", spacing=0)
    return sheet
