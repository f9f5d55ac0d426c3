"""Grids of tokens, and rotary positions on three axes (frame, row, column) over channel pairs."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError

Rope = tuple[mx.array, mx.array]
"""Cosines and sines."""


def axis_frequencies(axes: Sequence[int], theta: float) -> list[np.ndarray]:
    """For each axis of d channels its d/2 frequencies theta^(-2i/d)."""
    return [theta ** -(np.arange(0, d, 2) / d) for d in axes]


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate each pair (x[2i], x[2i+1]) of x (B, heads, N, D) in float32.

    Args:
        cos, sin: (N, D/2) for all samples, or (B, 1, N, D/2).
    """
    pairs = x.astype(mx.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def token_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of tokens for latents of `height` x `width`; `UserError` for other sizes."""
    if height % patch or width % patch:
        raise UserError(
            f"latents of {height}x{width} do not divide by {patch}: choose a picture size "
            f"that divides by {8 * patch}"
        )
    return height // patch, width // patch
