"""Pictures with an alpha channel: in files, on a ground, and on a screen. Does not import mlx.

Networks and training data have colors times alpha ("premultiplied"), which are smooth where alpha
is 0; files have the colors themselves ("straight").
"""

import numpy as np
from PIL import Image

CLEAR, SOLID = 4, 8
"""Of 255: differences from no alpha and from the full one that nobody sees."""
SQUARE, SQUARES = 8, (204, 238)
"""Side in pixels and grays of a checkerboard."""


def straight(picture: np.ndarray) -> np.ndarray:
    """A uint8 picture (H, W, C) as files have it: with an alpha channel, colors divided by alpha.

    Alpha within `CLEAR` of 0 or `SOLID` of 255 becomes 0 or 255.
    """
    if picture.shape[-1] == 3:
        return picture
    alpha = picture[..., 3:].astype(np.float32)
    colors = np.rint(picture[..., :3] * (255 / np.maximum(alpha, 1)))
    colors = np.where(alpha <= CLEAR, 0, np.minimum(colors, 255))
    alpha = np.where(alpha <= CLEAR, 0, np.where(alpha >= 255 - SOLID, 255, alpha))
    return np.concatenate([colors, alpha], axis=-1).astype(np.uint8)


def over(picture: np.ndarray, ground: np.ndarray | int) -> np.ndarray:
    """A uint8 picture (H, W, C), its colors times alpha, over a ground; RGB as it is."""
    if picture.shape[-1] == 3:
        return picture
    below = ground * (255 - picture[..., 3:].astype(np.float32)) / 255
    return np.minimum(np.rint(picture[..., :3] + below), 255).astype(np.uint8)


def checkerboard(height: int, width: int) -> np.ndarray:
    """Gray squares (H, W, 1), shown behind transparent pictures."""
    rows, columns = np.arange(height) // SQUARE, np.arange(width) // SQUARE
    return np.where((rows[:, None] + columns) % 2, *SQUARES)[..., None].astype(np.uint8)


def shown(image: Image.Image) -> Image.Image:
    """An RGB picture for a screen: transparent parts are over a checkerboard."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    ground = checkerboard(image.height, image.width)
    return Image.fromarray(over(np.asarray(image.convert("RGBa")), ground))
