"""Random crops."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.pictures import from_uint8
from train.data.stickers.render import batch


def crops(seed: int, step: int, count: int, num_nouns: int | None, size: int) -> mx.array:
    """Random crops of training scenes, (count, size, size, 3) in [-1, 1]."""
    pictures, _ = batch(seed, step * count, count, num_nouns)
    rng = np.random.default_rng((seed, step, 1))
    tops, lefts = rng.integers(0, pictures.shape[1] - size + 1, (2, count))
    rows = tops[:, None, None] + np.arange(size)[None, :, None]
    columns = lefts[:, None, None] + np.arange(size)[None, None, :]
    return from_uint8(pictures[np.arange(count)[:, None, None], rows, columns])
