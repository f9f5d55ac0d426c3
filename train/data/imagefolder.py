"""A user's own pictures with captions, cropped to a few sizes (aspect buckets).

Captions follow the conventions of imagefolder: a `metadata.jsonl` with lines of `file_name`,
relative to its folder, and `text`; or a `.txt` beside each picture.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from train.data.streams import Stream

METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption")
# Pillow cannot read all of these: those that it cannot read are reported, not ignored.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".heic", ".heif", ".avif", ".jp2"),
)
SIDES = 16  # approximate number of possible sides of a bucket; few, also for large pictures
LONGEST = 2  # limit of a bucket's longer side, relative to the square with as many pixels

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True)
class Example:
    """A picture with its caption.

    Attributes:
        path: its file.
        caption: what it shows, without line breaks.
        pixels: uint8 (H, W, 3), RGB, of a bucket's size.
    """

    path: Path
    caption: str
    pixels: np.ndarray

    @property
    def size(self) -> Size:
        return self.pixels.shape[:2]


def read_folder(folder: Path, buckets: Sequence[Size]) -> tuple[list[Example], list[str]]:
    """All readable pictures with a caption in a folder and its subfolders.

    A picture with two captions in the metadata becomes two examples.

    Args:
        folder: with pictures and `metadata.jsonl` or `.txt` files.
        buckets: the sizes to crop to; each picture gets the one nearest in shape.

    Returns:
        the examples in the order of their names, and a line for each picture that is skipped.

    Raises:
        UserError: no such folder, damaged metadata, or no usable picture.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one with pictures and their captions")
    captions, skipped = find_captions(folder)
    examples = []
    for path, caption in captions:
        try:
            picture = read_picture(path)
        except UserError as error:
            skipped.append(str(error))
        else:
            examples.append(Example(path, caption, fit(picture, nearest_bucket(picture, buckets))))
    if not examples:
        examples_of = f" ({len(skipped)} skipped, such as {skipped[0]})" if skipped else ""
        raise UserError(
            f"no picture with a caption in {folder}{examples_of}: put a .txt with a caption beside "
            f"each picture, or a {METADATA} with lines "
            '{"file_name": "cat.png", "text": "a cat"}'
        )
    return examples, skipped


def find_captions(folder: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """(picture, caption) pairs in the order of their paths, and lines on those without a caption.

    Raises:
        UserError: damaged metadata.
    """
    found, skipped, named = [], [], set()
    files = sorted(p for p in folder.rglob("*") if not _is_hidden(p.relative_to(folder)))
    for metadata in (p for p in files if p.name == METADATA):
        for path, caption in _read_metadata(metadata):
            named.add(path)
            if not path.is_file():
                skipped.append(f"{path}: named in {metadata.name}, but not there")
            elif not caption:
                skipped.append(f"{path}: its caption is empty")
            else:
                found.append((path, caption))
    for path in files:
        if path.suffix.lower() not in SUFFIXES or path in named:
            continue
        text = path.with_suffix(".txt")
        try:
            caption = _one_line(text.read_text(encoding="utf-8-sig")) if text.is_file() else None
        except (OSError, UnicodeDecodeError):
            skipped.append(f"{path}: {text.name} is not readable as UTF-8")
            continue
        if caption:
            found.append((path, caption))
        else:
            skipped.append(f"{path}: " + ("no caption" if caption is None else "an empty caption"))
    return sorted(found), skipped


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read_metadata(path: Path) -> list[tuple[Path, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = entry["file_name"]
            caption = next(entry[key] for key in CAPTION_KEYS if key in entry)
            pairs.append((path.parent / name, _one_line(caption)))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            raise UserError(
                f"{path}, line {number}: expected "
                '{"file_name": "cat.png", "text": "a cat"}, got ' + line[:60]
            ) from None
    return pairs


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, rotated by its EXIF tag, transparent parts over white.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read here; save it as PNG") from None
    except Exception as error:
        # Pillow may raise an exception of any kind for a damaged file.
        reason = _one_line(str(error)) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit gray to 8 bits.
        gray = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def bucket_sizes(size: Size, unit: int) -> list[Size]:
    """Sizes of about as many pixels as `size`, from 1:4 to 4:1; `size` is one of them.

    Args:
        size: (height, width), multiples of `unit`.
        unit: sides are multiples of this.
    """
    area = size[0] * size[1]
    side = math.sqrt(area)
    step = unit * max(1, round(side / SIDES / unit))
    found = {size, size[::-1]}
    for short in range(step, math.floor(side) + 1, step):
        long = area // short // step * step
        if short <= long <= LONGEST * side:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest_bucket(picture: Image.Image, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to the picture's, by the ratio of their aspects."""
    aspect = math.log(picture.width / picture.height)
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def fit(picture: Image.Image, size: Size) -> np.ndarray:
    """The largest centered crop of the picture with the aspect of `size`, resized to it: uint8."""
    height, width = size
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))


def describe(examples: Sequence[Example]) -> str:
    """A summary such as "4 pictures (3 of 64x32, 1 of 32x64 pixels)"."""
    sizes = Counter(example.size for example in examples)
    counts = ", ".join(f"{n} of {w}x{h}" for (h, w), n in sorted(sizes.items()))
    return f"{len(examples)} pictures ({counts} pixels)"


def digest(examples: Sequence[Example]) -> str:
    """A hash of pictures and captions."""
    state = hashlib.blake2b(digest_size=8)
    for example in examples:
        state.update(f"{example.size}{example.caption}".encode() + example.pixels.tobytes())
    return state.hexdigest()


class PictureFolder:
    """The pictures of a folder: a `PictureSource`.

    Args:
        examples: from `read_folder`.
        seed: of the choice of pictures.
        flip: add the pictures' mirror images.

    Attributes:
        buckets: the examples of each size.
    """

    def __init__(self, examples: Sequence[Example], *, seed: int = 0, flip: bool = False):
        self.examples, self.seed, self.flip = list(examples), seed, flip
        self.buckets: list[list[Example]] = []
        for size in sorted({example.size for example in examples}):
            bucket = [example for example in examples if example.size == size]
            mirrored = [replace(e, pixels=e.pixels[:, ::-1]) for e in bucket if flip]
            self.buckets.append(bucket + mirrored)

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`; all pictures of a batch are of one bucket."""
        rng = Stream.PICTURE_FOLDER.generator(self.seed, number)
        bucket, rows = choose(rng, [len(bucket) for bucket in self.buckets], count)
        chosen = [self.buckets[bucket][row] for row in rows]
        return np.stack([e.pixels for e in chosen]), [e.caption for e in chosen]

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        return {"data": "folder", "pictures": digest(self.examples), "flip": self.flip}


def choose(rng: np.random.Generator, counts: Sequence[int], count: int) -> tuple[int, list[int]]:
    """A random bucket, in proportion to its number of pictures, and `count` of its rows."""
    sizes = np.array(counts)
    bucket = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    return bucket, some(rng, counts[bucket], count)


def some(rng: np.random.Generator, total: int, count: int) -> list[int]:
    """`count` random indices below `total`, without repetition if there are enough."""
    return rng.choice(total, count, replace=count > total).tolist()
