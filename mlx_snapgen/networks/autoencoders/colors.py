"""Rough pictures of latents without a decoder, for previews: a linear map from latents to colors.

A large decoder takes longer than many steps of a small network. Latents of natural pictures are
nearly linear in the colors of the pixels that they stand for, so the map needs no training: it is
fitted to the encoder, on a few generated pictures.
"""

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder

SIDE = 128
COUNT = 4
"""Pictures to fit to, of SIDE x SIDE pixels."""
RIDGE = 1e-3
SMALL = ("convolutional", "taehv", "pixels")
"""Kinds whose decoder is fast enough for previews."""


def has_fast_decoder(config: AutoencoderConfig) -> bool:
    """Whether the decoder takes little time beside a step of a network."""
    return config.kind in SMALL


def fit_colors(autoencoder: Autoencoder) -> mx.array:
    """(C + 1, 3): the weights of a latent's channels and the offset of its color in [-1, 1]."""
    side = SIDE // autoencoder.config.downsampling
    rows, colors = [], []
    for picture in _pictures():
        x = mx.array(picture[None])
        # Denormalized, because FLUX.2's normalization differs within a patch.
        rows.append(np.array(autoencoder.denormalize(autoencoder.encode(x)).astype(mx.float32)))
        colors.append(picture.reshape(side, SIDE // side, side, SIDE // side, 3).mean((1, 3)))
    latents = _with_ones(np.concatenate(rows).reshape(COUNT * side**2, -1))
    squares = latents.T @ latents
    squares += RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
    return mx.array(np.linalg.solve(squares, latents.T @ np.reshape(colors, (-1, 3))), mx.float32)


def rough_picture(latents: mx.array, colors: mx.array, autoencoder: Autoencoder) -> mx.array:
    """Latents (1, h, w, C) -> picture (1, h, w, 3), about [-1, 1]: a pixel for each latent.

    Args:
        colors: from `fit_colors` for an autoencoder with the same latents.
    """
    return autoencoder.denormalize(latents.astype(mx.float32)) @ colors[:-1] + colors[-1]


def _with_ones(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1).astype(np.float64)


def _pictures() -> list[np.ndarray]:
    """Pictures (SIDE, SIDE, 3) in [-1, 1] of smooth colors, edges and a little texture."""
    random, found = np.random.default_rng(0), []
    for cells in (3, 5, 9, 17)[:COUNT]:
        small = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
        picture = np.array(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
        for _ in range(6):
            top, left = random.integers(0, SIDE, 2)
            height, width = random.integers(SIDE // 8, SIDE // 2, 2)
            picture[top : top + height, left : left + width] = random.integers(0, 256, 3)
        picture += random.normal(0, 6, picture.shape)
        found.append(np.clip(picture / 127.5 - 1, -1, 1).astype(np.float32))
    return found
