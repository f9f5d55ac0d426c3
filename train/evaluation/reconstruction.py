"""Pictures through an autoencoder and back."""

import numpy as np

from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.pictures import from_uint8, to_uint8

AT_ONCE = 4
"""More are no faster, and the bar would wait for them."""


def reconstruct(
    model: Autoencoder, pictures: np.ndarray, encoder: Autoencoder | None = None
) -> np.ndarray:
    """Encode and decode uint8 pictures (B, H, W, 3), `AT_ONCE` at a time.

    Args:
        encoder: encodes instead of `model`.
    """
    out = []
    with picture_bar(len(pictures), "reconstruction") as progress:
        for i in range(0, len(pictures), AT_ONCE):
            some = pictures[i : i + AT_ONCE]
            out.append(to_uint8(model.decode((encoder or model).encode(from_uint8(some)))))
            progress(len(some))
    return np.concatenate(out)
