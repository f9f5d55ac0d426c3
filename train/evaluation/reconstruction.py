"""Pictures through an autoencoder and back."""

import numpy as np
from tqdm import tqdm

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.pictures import from_uint8, to_uint8


def reconstruct(
    model: Autoencoder, pictures: np.ndarray, encoder: Autoencoder | None = None
) -> np.ndarray:
    """Encode and decode uint8 pictures (B, H, W, 3), 16 at a time.

    Args:
        encoder: encodes instead of `model`.
    """
    out = []
    for i in tqdm(range(0, len(pictures), 16), desc="reconstruction", leave=False):
        y = model.decode((encoder or model).encode(from_uint8(pictures[i : i + 16])))
        out.append(to_uint8(y))
    return np.concatenate(out)
