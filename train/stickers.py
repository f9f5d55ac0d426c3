"""Captioned pictures without end, drawn from the glyphs of the Noto Color Emoji font.

A scene (train/scenes.py) is one to four glyphs on a plain background; its caption
(train/captions.py) is everyday English. This module finds the font, recolours and resizes its
glyphs, puts them together into pictures and writes contact sheets:

    python -m train.stickers --output sheet.png --count 64

or an imagefolder of one noun, to try fine-tuning on:

    python -m train.stickers --noun zebra --count 20 --output runs/zebra
"""

import argparse
import functools
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mlx_snapgen.errors import UserError, run_command
from train.captions import Placed, Scene, plain_caption
from train.scenes import (
    CATEGORIES,
    SIDE,
    first_nouns,
    is_held_out_colour,
    is_held_out_pair,
    noun_scene,
    sample_scene,
    scenes,
    training_scene,
    validation_scenes,
)
from train.vocabulary import BACKGROUNDS, COLOURS, NOUNS, Noun

__all__ = [
    "BACKGROUNDS",
    "CATEGORIES",
    "COLOURS",
    "NOUNS",
    "SIDE",
    "Noun",
    "Placed",
    "Scene",
    "batch",
    "drawn_box",
    "find_font",
    "is_held_out_colour",
    "is_held_out_pair",
    "plain_caption",
    "render",
    "sample_scene",
    "scenes",
    "sprite",
    "training_scene",
    "validation_scenes",
]

STRIKE = 109  # the one size, in pixels per em, that the bitmap font holds
FONT_FOLDERS = (
    "/usr/share/fonts/truetype/noto",
    "/usr/share/fonts/noto",
    "~/Library/Fonts",
    "/Library/Fonts",
    "~/.local/share/fonts",
    "~/.fonts",
)
INSTALL = "`apt install fonts-noto-color-emoji` or `brew install --cask font-noto-color-emoji`"
# The builds with vector glyphs (COLRv1, SVG) have the same name, but Pillow cannot draw them.
OTHER_FONT = (
    "a build with bitmaps is fonts/NotoColorEmoji.ttf of https://github.com/googlefonts/noto-emoji"
)


def find_font(path: str | Path | None = None) -> Path:
    """The Noto Color Emoji font: `path` if given, else the first found in the usual folders.

    Raises:
        UserError: no such file; the message names the two commands that install the font.
    """
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"no font at {path}; {INSTALL} installs Noto Color Emoji")
        return Path(path)
    for folder in FONT_FOLDERS:
        for found in sorted(Path(folder).expanduser().glob("NotoColorEmoji*.ttf")):
            return found
    raise UserError(f"the font Noto Color Emoji is not installed; {INSTALL} installs it")


@functools.lru_cache(maxsize=2)
def _font(path: str | Path | None) -> ImageFont.FreeTypeFont:
    path = find_font(path)
    try:
        # From bytes, because for a file that it cannot read Pillow silently takes an installed
        # font of the same name.
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
    colours = canvas.convert("RGB").getextrema() if box else ()
    if not any(high for _, high in colours):
        raise UserError(f"{find_font(font)} draws no picture for {emoji}; {OTHER_FONT}")
    return canvas.crop(box)


def _smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    x = np.clip((x - low) / (high - low), 0, 1)
    return x * x * (3 - 2 * x)


def dominant_hue(rgba: np.ndarray) -> float:
    """The hue in degrees that most of the saturated pixels of (H, W, 4) uint8 lie near."""
    hsv = np.asarray(Image.fromarray(rgba[..., :3]).convert("HSV"), np.float64)
    weight = (hsv[..., 1] / 255) * (hsv[..., 2] / 255) * (rgba[..., 3] / 255)
    weight = weight * (hsv[..., 1] > 50)
    histogram = np.bincount(hsv[..., 0].astype(int).ravel(), weight.ravel(), minlength=256)
    window = sum(np.roll(histogram, shift) for shift in range(-10, 11))
    return float(window.argmax()) * 360 / 256


def recolour(glyph: Image.Image, colour: str) -> Image.Image:
    """Give the glyph's dominant colour the hue, saturation and value of `colour`.

    Pixels near the dominant hue change, each by the ratio of its saturation and value to their
    medians, so that shading stays; leaves, wheels and outlines keep their own colours.
    """
    rgba = np.asarray(glyph)
    hsv = np.asarray(glyph.convert("RGB").convert("HSV"), np.float32) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    offset = (hue - dominant_hue(rgba) + 180) % 360 - 180
    weight = (1 - _smoothstep(np.abs(offset), 38, 58)) * _smoothstep(saturation, 0.08, 0.25)
    chosen = (weight > 0.5) & (rgba[..., 3] > 128)
    target_hue, target_saturation, target_value = COLOURS[colour]
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


@functools.lru_cache(maxsize=2048)  # about 55 kB each; holds every noun in every colour
def _recoloured(font: str | Path | None, emoji: str, colour: str | None) -> Image.Image:
    glyph = _glyph(font, emoji)
    glyph = glyph if colour is None else recolour(glyph, colour)
    return glyph.convert("RGBa")


@dataclass(frozen=True)
class Sprite:
    """A glyph ready to be laid over a picture.

    Attributes:
        rgb: uint8 (h, w, 3), colours times alpha.
        keep: uint16 (h, w, 1), share of the background that shows through, out of 256.
    """

    rgb: np.ndarray
    keep: np.ndarray


@functools.lru_cache(maxsize=8192)  # about 13 kB each
def sprite(noun: Noun, colour: str | None, size_px: int, font: str | Path | None = None) -> Sprite:
    """The glyph of `noun` in `colour` (None: its own) with its longer side `size_px` pixels."""
    glyph = _recoloured(font, noun.emoji, colour)
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
    cx, cy = placed.centre
    return int(cx * scale - width / 2), int(cy * scale - height / 2)


def drawn_box(placed: Placed, font: str | Path | None = None) -> tuple[int, int, int, int]:
    """The box (x, y, w, h) in pixels that the glyph fills; its cell is at least as large."""
    drawn = sprite(placed.noun, placed.colour, placed.size_px, font)
    height, width = drawn.rgb.shape[:2]
    return *_corner(placed, drawn, 1.0), width, height


@functools.lru_cache(maxsize=2 * len(BACKGROUNDS))
def _plain(background: str, size: int) -> np.ndarray:
    return np.full((size, size, 3), BACKGROUNDS[background], np.uint8)


def render(scene: Scene, size: int = SIDE, font: str | Path | None = None) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw, placed on a square of SIDE pixels.
        size: side of the picture in pixels; places and glyphs scale along.
        font: path of the font; None looks in the usual places.

    Returns:
        uint8 (size, size, 3), RGB.
    """
    picture = _plain(scene.background, size).copy()
    scale = size / SIDE
    for placed in scene.placed:
        drawn = sprite(placed.noun, placed.colour, round(placed.size_px * scale), font)
        x, y = _corner(placed, drawn, scale)
        height, width = drawn.rgb.shape[:2]
        under = picture[y : y + height, x : x + width]
        under[:] = (under * drawn.keep >> 8) + drawn.rgb
    return picture


def batch(
    seed: int,
    start: int,
    count: int,
    num_nouns: int | None = None,
    font: str | Path | None = None,
    categories: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Training scenes start ... start + count - 1 of a seed; see `training_scene`.

    Returns:
        images: uint8 (count, 128, 128, 3), RGB.
        captions: list of `count` strings.
    """
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions = []
    for k in range(count):
        scene = training_scene(seed, start + k, num_nouns, categories)
        images[k] = render(scene, font=font)
        captions.append(scene.caption)
    return images, captions


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


def glyph_scenes(num_nouns: int | None = None) -> list[Scene]:
    """Every noun alone, and every recolourable one in each colour, in the nouns' order."""
    pictures = []
    for noun in first_nouns(num_nouns):
        for colour in (None, *COLOURS) if noun.recolour else (None,):
            background = "grey" if colour == "white" else "white"
            said = noun.name if colour is None else f"{colour} {noun.name}"
            placed = (Placed(noun, colour, 112, 8, 8),)
            pictures.append(Scene("colors", placed, background, said))
    return pictures


def write_imagefolder(folder: Path, shown: Sequence[Scene], font: str | Path | None = None) -> None:
    """Write scenes as pictures and a metadata.jsonl with their captions, into a new folder."""
    folder.mkdir(parents=True)
    lines = []
    for k, scene in enumerate(shown):
        name = f"{k:03d}.png"
        Image.fromarray(render(scene, font=font)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": scene.caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Write a contact sheet, or an imagefolder."""
    parser = argparse.ArgumentParser(
        prog="python -m train.stickers",
        description="Look at the training pictures: a contact sheet of captioned scenes, drawn "
        "from the Noto Color Emoji font.",
        epilog=f"The font is installed by {INSTALL}.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="PNG file to write, or with --noun a folder; must not exist yet",
    )
    parser.add_argument(
        "--noun",
        metavar="NAME",
        help="write a folder of pictures of this noun alone and a metadata.jsonl with captions",
    )
    parser.add_argument(
        "--count", type=int, default=64, help="how many scenes to show (default 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the scenes, as in training (default 0)"
    )
    parser.add_argument(
        "--num-nouns",
        type=int,
        metavar="N",
        help=f"use the first N nouns (default: all {len(NOUNS)})",
    )
    parser.add_argument(
        "--glyphs",
        action="store_true",
        help="show every noun once, and in every colour it can have, instead of scenes",
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="show the validation scenes instead; every fourth is a held-out combination",
    )
    parser.add_argument("--font", metavar="TTF", help="NotoColorEmoji.ttf, if in no usual place")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; choose another --output or remove it")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; create it first")
    if args.count < 1:
        raise UserError(f"--count is {args.count}; it must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative")
    if args.noun:
        shown = [noun_scene(args.noun, args.seed, k) for k in range(args.count)]
        write_imagefolder(output, shown, args.font)
        print(f"{output}: {len(shown)} pictures of one noun")
        return
    if args.glyphs:
        shown = glyph_scenes(args.num_nouns)
    elif args.validation:
        shown = validation_scenes(args.count, args.num_nouns)
    else:
        shown = [training_scene(args.seed, k, args.num_nouns) for k in range(args.count)]
    size = 64 if args.glyphs else SIDE
    pictures = [render(scene, size, args.font) for scene in shown]
    columns = 16 if args.glyphs else min(8, len(pictures))
    contact_sheet(pictures, [scene.caption for scene in shown], columns).save(output, "PNG")
    print(f"{output}: {len(pictures)} pictures")


if __name__ == "__main__":
    run_command(main)
