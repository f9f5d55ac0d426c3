"""Random crops."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.pictures import from_uint8
from train.data.source import PictureSource
from train.data.streams import Stream


def crops(source: PictureSource, number: int, *, count: int, size: int, seed: int) -> mx.array:
    """Random crops of batch `number` of a source, (count, size, size, 3) in [-1, 1].

    Raises:
        UserError: a picture is smaller.
    """
    pictures, _ = source.batch(number, count)
    height, width = pictures.shape[1:3]
    if size > min(height, width):
        raise UserError(f"crops of {size} pixels do not fit into pictures of {height}x{width}")
    rng = Stream.CROPS.generator(seed, number)
    tops, lefts = rng.integers(0, np.array(pictures.shape[1:3])[:, None] - size + 1, (2, count))
    rows = tops[:, None, None] + np.arange(size)[None, :, None]
    columns = lefts[:, None, None] + np.arange(size)[None, None, :]
    return from_uint8(pictures[np.arange(count)[:, None, None], rows, columns])
