"""Sticker scenes to pictures, from the glyphs of the Noto Color Emoji font."""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, new_folder
from train.data.stickers.captions import Placed, Scene
from train.data.stickers.scenes import SIDE
from train.data.stickers.vocabulary import BACKGROUNDS, COLORS, Noun, first_nouns

STRIKE = 109  # the only size of the bitmap font, in pixels per em


FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "~/Library/Fonts",
    "/Library/Fonts",
    "~/.local/share/fonts",
    "~/.fonts",
)


URL = "https://github.com/googlefonts/noto-emoji/raw/main/fonts/NotoColorEmoji.ttf"
INSTALL = (
    "on Linux `apt install fonts-noto-color-emoji`, on a Mac "
    f"`curl -L -o ~/Library/Fonts/NotoColorEmoji.ttf {URL}`"
)


# The builds with vector glyphs (COLRv1, SVG) have the same name, but Pillow cannot draw them.
OTHER_FONT = f"this build has bitmaps: {URL}"


def find_font(path: str | Path | None = None) -> Path:
    """The Noto Color Emoji font: `path` if given, else the first found in the usual folders.

    Raises:
        UserError: no such file; the message names the two commands that install the font.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"no font at {path}; to install Noto Color Emoji: {INSTALL}")
        return Path(path)
    for folder in FONT_FOLDERS:
        for found in sorted(expanded(folder).glob("NotoColorEmoji*.ttf")):
            return found
    raise UserError(f"the font Noto Color Emoji is not installed; to install it: {INSTALL}")


@functools.lru_cache(maxsize=2)
def _font(path: str | Path | None) -> ImageFont.FreeTypeFont:
    path = find_font(path)
    try:
        # Pass bytes, not the path: if Pillow cannot read a file, it silently uses an installed font
        # of the same name.
        return ImageFont.truetype(io.BytesIO(path.read_bytes()), STRIKE)
    except OSError as error:
        raise UserError(
            f"{path} holds no bitmaps of {STRIKE} pixels ({error}); {OTHER_FONT}"
        ) from None


@functools.lru_cache(maxsize=1024)
def _glyph(font: str | Path | None, emoji: str) -> Image.Image:
    """The glyph cropped to what is drawn, RGBA."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    drawing = ImageDraw.Draw(canvas)
    drawing.text((STRIKE // 4, STRIKE // 4), emoji, font=_font(font), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or not np.asarray(canvas.convert("RGB")).any():
        raise UserError(f"{find_font(font)} draws no picture for {emoji}; {OTHER_FONT}")
    return canvas.crop(box)


def _smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def dominant_hue(rgba: np.ndarray) -> float:
    """The most frequent hue, in degrees, of the saturated pixels of (H, W, 4) uint8."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV"), np.float64)
    weight = (hsv[..., 1] / 255) * (hsv[..., 2] / 255) * (rgba[..., 3] / 255)
    weight = weight * (hsv[..., 1] > 50)
    histogram = np.bincount(hsv[..., 0].astype(int).ravel(), weight.ravel(), minlength=256)
    window = np.sum([np.roll(histogram, shift) for shift in range(-10, 11)], axis=0)
    return float(window.argmax()) * 360 / 256


def recolor(glyph: Image.Image, color: str) -> Image.Image:
    """Give the glyph's dominant color the hue, saturation and value of `color`.

    Pixels near the dominant hue change, each by the ratio of its saturation and value to their
    medians, so that shading stays; leaves, wheels and outlines keep their own colors.
    """
    rgba = np.asarray(glyph)
    hsv = np.asarray(glyph.convert("RGB").convert("HSV"), np.float32) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    offset = (hue - dominant_hue(rgba) + 180) % 360 - 180
    weight = (1 - _smoothstep(np.abs(offset), 38, 58)) * _smoothstep(saturation, 0.08, 0.25)
    chosen = (weight > 0.5) & (rgba[..., 3] > 128)
    target_hue, target_saturation, target_value = COLORS[color]
    new = np.stack(
        [
            (target_hue + 0.25 * offset) % 360 / 360,
            np.clip(target_saturation * saturation / np.median(saturation[chosen]), 0, 1),
            np.clip(target_value * value / np.median(value[chosen]), 0, 1),
        ],
        axis=-1,
    )
    changed = Image.fromarray(np.rint(new * 255).astype(np.uint8), "HSV").convert("RGB")
    weight = weight[..., None]
    rgb = weight * np.asarray(changed) + (1 - weight) * rgba[..., :3]
    rgb = np.rint(rgb).astype(np.uint8)
    return Image.fromarray(np.concatenate([rgb, rgba[..., 3:]], axis=-1))


@functools.lru_cache(maxsize=2048)  # about 55 kB each, enough for every noun in every color
def _recolored(font: str | Path | None, emoji: str, color: str | None) -> Image.Image:
    glyph = _glyph(font, emoji)
    glyph = glyph if color is None else recolor(glyph, color)
    return glyph.convert("RGBa")


@dataclass(frozen=True)
class Sprite:
    """A glyph ready to be laid over a picture.

    Attributes:
        rgb: uint8 (h, w, 3), colors times alpha.
        keep: uint16 (h, w, 1), share of the background that remains visible, out of 256.
    """

    rgb: np.ndarray
    keep: np.ndarray


@functools.lru_cache(maxsize=8192)  # about 13 kB each
def sprite(noun: Noun, color: str | None, size_px: int, font: str | Path | None = None) -> Sprite:
    """The glyph of `noun` in `color` (None: its own) with its longer side `size_px` pixels."""
    glyph = _recolored(font, noun.emoji, color)
    scale = size_px / max(glyph.size)
    width, height = (max(round(side * scale), 1) for side in glyph.size)
    pixels = np.asarray(glyph.resize((width, height), Image.Resampling.BICUBIC))
    keep = np.rint((255 - pixels[..., 3:].astype(np.float64)) * 256 / 255).astype(np.uint16)
    room = 255 - (255 * keep >> 8)  # rgb + background * keep / 256 must not pass 255
    rgb = np.minimum(pixels[..., :3], room).astype(np.uint8)
    return Sprite(rgb, keep)


def _corner(placed: Placed, drawn: Sprite, scale: float) -> tuple[int, int]:
    """Left and top edge of a glyph in the middle of its cell."""
    height, width = drawn.rgb.shape[:2]
    cx, cy = placed.center
    return int(cx * scale - width / 2), int(cy * scale - height / 2)


def drawn_box(placed: Placed, font: str | Path | None = None) -> tuple[int, int, int, int]:
    """The box (x, y, w, h) in pixels that the glyph fills; its cell is at least as large."""
    drawn = sprite(placed.noun, placed.color, placed.size_px, font)
    height, width = drawn.rgb.shape[:2]
    return *_corner(placed, drawn, 1.0), width, height


@functools.lru_cache(maxsize=2 * len(BACKGROUNDS))
def _plain(background: str, size: int) -> np.ndarray:
    return np.full((size, size, 3), BACKGROUNDS[background], np.uint8)


def render(scene: Scene, size: int = SIDE, *, font: str | Path | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw, placed on a square of SIDE pixels.
        size: side of the picture in pixels; positions and glyphs are scaled.
        font: path of the font; None looks in the usual places.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    picture = _plain(scene.background, size).copy()
    scale = size / SIDE
    for placed in scene.placed:
        drawn = sprite(placed.noun, placed.color, round(placed.size_px * scale), font)
        x, y = _corner(placed, drawn, scale)
        height, width = drawn.rgb.shape[:2]
        under = picture[y : y + height, x : x + width]
        under[:] = (under * drawn.keep >> 8) + drawn.rgb
    return picture


def glyph_scenes(num_nouns: int | None = None) -> list[Scene]:
    """Every noun alone, and every recolorable one in each color, in the nouns' order."""
    pictures = []
    for noun in first_nouns(num_nouns):
        for color in (None, *COLORS) if noun.recolor else (None,):
            background = "grey" if color == "white" else "white"
            caption = noun.name if color is None else f"{color} {noun.name}"
            placed = (Placed(noun, color, 112, 8, 8),)
            pictures.append(Scene("colors", placed, background, caption))
    return pictures


def write_imagefolder(folder: Path, shown: Sequence[Scene], font: str | Path | None = None) -> None:
    """Write scenes as pictures and a metadata.jsonl with their captions, into a new folder."""
    lines = []
    with new_folder(folder) as partial:
        for k, scene in enumerate(shown):
            name = f"{k:03d}.png"
            Image.fromarray(render(scene, font=font)).save(partial / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines))
