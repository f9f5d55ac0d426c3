"""A user's own pictures with captions, cropped to a few sizes (aspect buckets).

Captions follow the conventions of imagefolder: a `metadata.jsonl` with lines of `file_name`,
relative to its folder, and `text`, or a `metadata.csv` with these columns; or a `.txt` beside each
picture.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.files import expanded
from mlx_snapgen.picture_files import MAX_BYTES, Size, Unusable, decode
from mlx_snapgen.reading import check_size, open_regular
from train.data.readers.folder import METADATA, NO_CAPTION, TEMPLATE_HINT, PictureFolderRecords
from train.data.source import Skipped
from train.data.streams import Stream

SIDES = 16  # approximate number of possible sides of a bucket; few, also for large pictures
LONGEST = 2  # limit of a bucket's longer side, relative to the square with as many pixels


@dataclass(frozen=True)
class Example:
    """A picture with its caption.

    Attributes:
        path: its file.
        caption: what it shows, without line breaks.
        pixels: uint8 (H, W, 3), RGB, of a bucket's size; or (H, W, 4), the colors times alpha.
    """

    path: Path
    caption: str
    pixels: np.ndarray

    @property
    def size(self) -> Size:
        return self.pixels.shape[:2]


def read_folder(
    folder: Path, buckets: Sequence[Size], *, has_alpha: bool = False, template: str | None = None
) -> tuple[list[Example], list[str]]:
    """All readable pictures with a caption in a folder and its subfolders.

    A picture with two captions in the metadata becomes two examples.

    Args:
        folder: with pictures and `metadata.jsonl` or `.txt` files.
        buckets: the sizes to crop to; each picture gets the one nearest in shape.
        has_alpha: the examples have an alpha channel.
        template: see `PictureFolderRecords`.

    Returns:
        the examples in the order of their names, and a line for each picture that is skipped.

    Raises:
        UserError: no such folder, or no usable picture.
    """
    folder = expanded(folder)
    captions, skipped = find_captions(folder, template)
    examples = []
    for path, caption in captions:
        try:
            picture = read_picture(path, has_alpha=has_alpha)
        except UserError as error:
            skipped.append(str(error))
        else:
            examples.append(Example(path, caption, fit(picture, nearest_bucket(picture, buckets))))
    if not examples and any(TEMPLATE_HINT in line for line in skipped):
        raise UserError(
            f"no picture with a caption in {folder} ({len(skipped)} skipped): {TEMPLATE_HINT}"
        )
    if not examples:
        examples_of = f" ({len(skipped)} skipped, such as {skipped[0]})" if skipped else ""
        raise UserError(
            f"no picture with a caption in {folder}{examples_of}: put a .txt with a caption beside "
            f"each picture, or a {METADATA} with lines "
            '{"file_name": "cat.png", "text": "a cat"}'
        )
    return examples, skipped


def find_captions(
    folder: Path, template: str | None = None
) -> tuple[list[tuple[Path, str]], list[str]]:
    """(picture, caption) pairs in the order of their paths, and a line for each one skipped."""
    found, skipped = [], []
    for record in PictureFolderRecords(folder, template=template).records():
        if isinstance(record, Skipped):
            known = f"{NO_CAPTION}; " if record.detail == TEMPLATE_HINT else ""
            skipped.append(f"{folder / record.key}: {known}{record.detail or record.reason}")
        elif caption := next(iter(record.captions.values())):
            found.append((folder / record.place[0], caption))
        else:
            main, *others = record.captions
            there = [name for name in others if record.captions[name]]
            what = f"no {main}; it has: {', '.join(there)}" if there else "an empty caption"
            skipped.append(f"{folder / record.key}: {what}")
    return sorted(found), skipped


def read_picture(path: Path, *, has_alpha: bool = False) -> Image.Image:
    """A picture in RGB, or in RGBA if `has_alpha`: see `decode`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            check_size(file, MAX_BYTES)
            picture, _ = decode(file.read(), keep_alpha=has_alpha)
        return picture.convert("RGBA") if has_alpha else picture
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Unusable as error:
        raise UserError(f"{path}: {error}") from None


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
    return nearest_size((picture.height, picture.width), buckets)


def nearest_size(size: Size, buckets: Sequence[Size]) -> Size:
    """`nearest_bucket` of a picture of this size."""
    aspect = math.log(size[1] / size[0])
    return min(buckets, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def fit(picture: Image.Image, size: Size) -> np.ndarray:
    """The largest centered crop of the picture with the aspect of `size`, resized to it: uint8.

    The colors of an RGBA picture are multiplied by alpha.
    """
    height, width = size
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted.convert("RGBa") if fitted.mode == "RGBA" else fitted)


def describe(examples: Sequence[Example]) -> str:
    """A summary such as "4 pictures (3 of 64x32, 1 of 32x64 pixels)"."""
    sizes = Counter(example.size for example in examples)
    counts = ", ".join(f"{n} of {w}x{h}" for (h, w), n in sorted(sizes.items()))
    return f"{plural(len(examples), 'picture')} ({counts} pixels)"


def digest(examples: Sequence[Example]) -> str:
    """A hash of pictures and captions."""
    state = hashlib.blake2b(digest_size=8)
    for example in examples:
        state.update(f"{example.size}{example.caption}".encode() + example.pixels.tobytes())
    return state.hexdigest()


class PictureFolder:
    """The pictures of a folder.

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


def choose(rng: np.random.Generator, counts: Sequence[int], count: int) -> tuple[int, list[int]]:
    """A random bucket, in proportion to its number of pictures, and `count` of its rows."""
    sizes = np.array(counts)
    bucket = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    return bucket, some(rng, counts[bucket], count)


def some(rng: np.random.Generator, total: int, count: int) -> list[int]:
    """`count` random indices below `total`, without repetition if there are enough."""
    return rng.choice(total, count, replace=count > total).tolist()
