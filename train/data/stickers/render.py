"""Sticker scenes to pictures, from the Noto Color Emoji font or the pictures of Fluent Emoji."""

import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mlx_snapgen.alpha import straight
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, new_folder
from mlx_snapgen.reading import read_bytes
from mlx_snapgen.settings import machine_memory
from train.data.stickers.captions import Placed, Scene
from train.data.stickers.vocabulary import NOTO, Collection, Noun

STRIKE = 109  # the only size of the bitmap font, in pixels per em
KEPT = min(2**30, machine_memory() // 16)
"""Bytes of large pictures that are kept, recolored and scaled: most of the time of a scene."""


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


PICTURES = (
    "npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xf lobehub-fluent-emoji-3d-1.1.0.tgz, which "
    "writes the folder package"
)
FOLDERS = ("", "assets", "package/assets", "packages/3d/assets")
"""Where the pictures are in a folder that a user names: the npm package or the repository."""


def find_pictures(folder: str | Path) -> Path:
    """The folder with Fluent Emoji's pictures in 3D, which may be in a subfolder of `folder`.

    Raises:
        UserError: there are none; the message names the command that fetches them.
    """
    for part in FOLDERS:
        found = expanded(folder) / part
        if (found / "1f34e.webp").is_file():
            return found
    raise UserError(f"{folder} has no pictures such as 1f34e.webp; to fetch them: {PICTURES}")


def _picture(folder: Path, emoji: str) -> Image.Image:
    """The picture of an emoji, RGBA; file names may omit the variation selector."""
    points = [f"{ord(character):04x}" for character in emoji]
    plain = [point for point in points if point != "fe0f"]
    for names in (points, plain, [*plain, "fe0f"]):
        path = folder / f"{'-'.join(names)}.webp"
        if path.is_file():
            with Image.open(path) as picture:
                return picture.convert("RGBA")
    raise UserError(f"{folder} has no picture of {emoji}; to fetch them: {PICTURES}")


@functools.lru_cache(maxsize=2)
def _font(path: str | Path | None) -> ImageFont.FreeTypeFont:
    path = find_font(path)
    try:
        # Pass bytes, not the path: if Pillow cannot read a file, it silently uses an installed font
        # of the same name.
        return ImageFont.truetype(io.BytesIO(read_bytes(path, most=2**30)), STRIKE)
    except OSError as error:
        raise UserError(
            f"{path} holds no bitmaps of {STRIKE} pixels ({error}); {OTHER_FONT}"
        ) from None


@functools.lru_cache(maxsize=512)
def _glyph(font: str | Path | None, emoji: str) -> Image.Image:
    """The glyph cropped to what is drawn, RGBA."""
    if font is not None and Path(font).is_dir():
        picture = _picture(Path(font), emoji)
        return picture.crop(picture.getchannel("A").getbbox())
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


def recolor(
    glyph: Image.Image,
    target: tuple[float, float, float],
    *,
    hue: float | None = None,
    is_gray: bool = False,
) -> Image.Image:
    """Give the glyph's dominant color another hue, saturation and value.

    Pixels near the dominant hue change, each by the ratio of its saturation and value to their
    medians, so that shading stays; leaves, wheels and outlines keep their own colors.

    Args:
        target: hue in degrees, saturation and value in [0, 1] of the median pixel.
        hue: the dominant one in degrees; None: see `dominant_hue`.
        is_gray: change the gray pixels instead, by the ratio of their value alone. Where they are
            lighter than the median, the color is paler.
    """
    rgba = np.asarray(glyph)
    hsv = np.asarray(glyph.convert("RGB").convert("HSV"), np.float32) / 255
    angle, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    if is_gray:
        offset, weight = np.zeros_like(angle), 1 - _smoothstep(saturation, 0.3, 0.45)
    else:
        hue = dominant_hue(rgba) if hue is None else hue
        offset = (angle - hue + 180) % 360 - 180
        weight = (1 - _smoothstep(np.abs(offset), 38, 58)) * _smoothstep(saturation, 0.08, 0.25)
    chosen = (weight > 0.5) & (rgba[..., 3] > 128)
    target_hue, target_saturation, target_value = target
    middle = np.median(saturation[chosen])
    if is_gray:
        saturation, middle = np.minimum(np.median(value[chosen]) / np.maximum(value, 0.01), 1), 1
        saturation = saturation**2
    new = np.stack(
        [
            (target_hue + 0.25 * offset) % 360 / 360,
            np.clip(target_saturation * saturation / middle, 0, 1),
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
def _recolored(
    font: str | Path | None,
    noun: Noun,
    target: tuple[float, float, float] | None,
) -> Image.Image:
    glyph = _glyph(font, noun.emoji)
    if target is not None:
        glyph = recolor(glyph, target, hue=noun.hue, is_gray=noun.is_gray)
    return glyph.convert("RGBa")


# Of Fluent Emoji, whose pictures are larger: 200 kB each, and 60 kB each as sprites.
_recolored_large = functools.lru_cache(maxsize=KEPT // 2 // 200_000)(_recolored.__wrapped__)


@dataclass(frozen=True)
class Sprite:
    """A glyph ready to be laid over a picture.

    Attributes:
        rgb: uint8 (h, w, 3), colors times alpha.
        keep: uint16 (h, w, 1), share of the background that remains visible, out of 256.
    """

    rgb: np.ndarray
    keep: np.ndarray


def sprite(
    noun: Noun,
    color: str | None,
    size_px: int,
    font: str | Path | None = None,
    *,
    collection: Collection = NOTO,
) -> Sprite:
    """The glyph of `noun` in `color` (None: its own) with its longer side `size_px` pixels.

    Args:
        font: path of the font; None: of the collection's pictures, or else see `find_font`.

    Raises:
        UserError: no font, or no pictures.
    """
    font = font or collection.pictures
    if font is None and collection is not NOTO:
        raise UserError("these pictures are not in a font: give --data stickers:pictures=FOLDER")
    target = None if color is None else collection.colors[color]
    return (_sprite if collection is NOTO else _large_sprite)(noun, target, size_px, font)


@functools.lru_cache(maxsize=8192)  # about 13 kB each
def _sprite(
    noun: Noun,
    target: tuple[float, float, float] | None,
    size_px: int,
    font: str | Path | None,
) -> Sprite:
    return scaled(_recolored(font, noun, target), size_px, Image.Resampling.BICUBIC)


@functools.lru_cache(maxsize=KEPT // 2 // 60_000)
def _large_sprite(
    noun: Noun,
    target: tuple[float, float, float] | None,
    size_px: int,
    font: str | Path | None,
) -> Sprite:
    # Bicubic filters leave a bright rim on what is smooth up to its edge.
    return scaled(_recolored_large(font, noun, target), size_px, Image.Resampling.HAMMING)


def scaled(glyph: Image.Image, size_px: int, how: Image.Resampling) -> Sprite:
    """A premultiplied glyph with its longer side `size_px` pixels."""
    scale = size_px / max(glyph.size)
    width, height = (max(round(side * scale), 1) for side in glyph.size)
    pixels = np.asarray(glyph.resize((width, height), how))
    keep = np.rint((255 - pixels[..., 3:].astype(np.float64)) * 256 / 255).astype(np.uint16)
    room = 255 - (255 * keep >> 8)  # rgb + background * keep / 256 must not pass 255
    rgb = np.minimum(pixels[..., :3], room).astype(np.uint8)
    return Sprite(rgb, keep)


def _corner(placed: Placed, drawn: Sprite, scale: float) -> tuple[int, int]:
    """Left and top edge of a glyph in the middle of its cell."""
    height, width = drawn.rgb.shape[:2]
    cx, cy = placed.center
    return int(cx * scale - width / 2), int(cy * scale - height / 2)


@functools.lru_cache(maxsize=64)
def _plain(collection: Collection, background: str, size: tuple[int, int]) -> np.ndarray:
    color = collection.backgrounds[background]
    if not collection.has_alpha:
        return np.full((*size, 3), color, np.uint8)
    return np.full((*size, 4), (0, 0, 0, 0) if color is None else (*color, 255), np.uint8)


def render(scene: Scene, scale: float = 1.0, *, font: str | Path | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        scale: of the picture; positions and glyphs are scaled.
        font: path of the font; None looks in the usual places.

    Returns:
        uint8 (H, W, 3), RGB; or (H, W, 4) with alpha, the colors times alpha.
    """
    height, width = (round(side * scale) for side in scene.size)
    picture = _plain(scene.collection, scene.background, (height, width)).copy()
    for placed in scene.placed:
        size_px = round(placed.size_px * scale)
        drawn = sprite(placed.noun, placed.color, size_px, font, collection=scene.collection)
        x, y = _corner(placed, drawn, scale)
        height, width = drawn.rgb.shape[:2]
        under = picture[y : y + height, x : x + width]
        under[:] = under * drawn.keep >> 8
        under[..., :3] += drawn.rgb
        if scene.collection.has_alpha:
            under[..., 3:] += (255 - (255 * drawn.keep >> 8)).astype(np.uint8)
    return picture


def glyph_scenes(num_nouns: int | None = None, collection: Collection = NOTO) -> list[Scene]:
    """Every noun alone, and every recolorable one in each color, in the nouns' order."""
    pictures = []
    for noun in collection.first(num_nouns):
        for color in (None, *collection.colors) if noun.recolor else (None,):
            background = "grey" if color == "white" else "white"
            caption = noun.name if color is None else f"{color} {noun.name}"
            side = min(collection.size)
            size_px = side * 7 // 8
            start = (side - size_px) // 2
            placed = (Placed(noun, color, size_px, start, start),)
            pictures.append(
                Scene(
                    "colors",
                    placed,
                    background,
                    caption,
                    collection=collection,
                    size=collection.size,
                )
            )
    return pictures


def write_imagefolder(folder: Path, shown: Sequence[Scene], font: str | Path | None = None) -> None:
    """Write scenes as pictures and a metadata.jsonl with their captions, into a new folder."""
    lines = []
    with new_folder(folder) as partial:
        for k, scene in enumerate(shown):
            name = f"{k:03d}.png"
            Image.fromarray(straight(render(scene, font=font))).save(partial / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}) + "\n")
        (partial / "metadata.jsonl").write_text("".join(lines))


def write_cutout(
    folder: Path, noun: Noun, font: str | Path | None = None, *, collection: Collection = NOTO
) -> None:
    """Write the noun's picture alone, RGBA, on transparent ground, into a new folder."""
    glyph = _glyph(font or collection.pictures, noun.emoji)
    # A thing that fills its box is a cut-out too.
    cutout = ImageOps.expand(glyph, border=2, fill=(0, 0, 0, 0))
    with new_folder(folder) as partial:
        cutout.save(partial / f"{noun.name.replace(' ', '-')}.png")
