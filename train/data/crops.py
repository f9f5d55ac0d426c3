"""Random crops."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.pictures import from_uint8
from train.data.source import PictureSource, SemanticSource
from train.data.streams import Stream


def crops(source: PictureSource, number: int, *, count: int, size: int, seed: int) -> mx.array:
    """Random crops of batch `number` of a source, (count, size, size, 3) in [-1, 1].

    Where a picture's shorter side is below `size`, crops of the batch have that side.
    """
    pictures, _ = source.batch(number, count)
    size = min(size, *pictures.shape[1:3])
    corners = _corners(pictures, size, Stream.CROPS.generator(seed, number))
    return from_uint8(_cut(pictures, corners, size))


def semantic_crops(
    source: SemanticSource, number: int, *, count: int, size: int, seed: int, factor: int
) -> tuple[mx.array, np.ndarray]:
    """As `crops`, at multiples of `factor` pixels, and what is where in them.

    Returns:
        pictures: (count, size, size, C) in [-1, 1].
        semantics: float32 (count, size / factor, size / factor, S).
    """
    pictures, _ = source.batch(number, count)
    maps = source.semantics(number, count, factor=factor)
    side = min(size // factor, *maps.shape[1:3])
    corners = _corners(maps, side, Stream.CROPS.generator(seed, number))
    found = _cut(pictures, corners * factor, side * factor)
    return from_uint8(found), _cut(maps, corners, side)


def _corners(arrays: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random tops and lefts of a square in each array, (2, N)."""
    room = np.array(arrays.shape[1:3])[:, None] - size + 1
    return rng.integers(0, room, (2, len(arrays)))


def _cut(arrays: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, C) -> the squares with these tops and lefts, (N, size, size, C)."""
    tops, lefts = corners
    rows = tops[:, None, None] + np.arange(size)[None, :, None]
    columns = lefts[:, None, None] + np.arange(size)[None, None, :]
    return arrays[np.arange(len(arrays))[:, None, None], rows, columns]
