"""Pictures through an autoencoder and back."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.pictures import to_float


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures."""
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) / 255**2))


def reconstruct(
    model: Autoencoder, pictures: np.ndarray, encoder: Autoencoder | None = None
) -> np.ndarray:
    """uint8 pictures (B, H, W, 3) through the autoencoder and back, 16 at a time.

    `encoder` encodes in the model's place.
    """
    out = []
    for i in range(0, len(pictures), 16):
        y = model.decode((encoder or model).encode(to_float(pictures[i : i + 16])))
        out.append(np.array(mx.round((mx.clip(y, -1, 1) + 1) * 127.5).astype(mx.uint8)))
    return np.concatenate(out)
