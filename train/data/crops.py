"""Random crops."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.pictures import from_uint8
from train.data.source import PictureSource
from train.data.streams import Stream


def crops(source: PictureSource, number: int, *, count: int, size: int, seed: int) -> mx.array:
    """Random crops of batch `number` of a source, (count, size, size, 3) in [-1, 1].

    Where a picture's shorter side is below `size`, crops of the batch have that side.
    """
    pictures, _ = source.batch(number, count)
    height, width = pictures.shape[1:3]
    size = min(size, height, width)
    rng = Stream.CROPS.generator(seed, number)
    tops, lefts = rng.integers(0, np.array(pictures.shape[1:3])[:, None] - size + 1, (2, count))
    rows = tops[:, None, None] + np.arange(size)[None, :, None]
    columns = lefts[:, None, None] + np.arange(size)[None, None, :]
    return from_uint8(pictures[np.arange(count)[:, None, None], rows, columns])
