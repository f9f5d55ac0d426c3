"""Arrays to 8-bit pictures."""

import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError


def to_pictures(decoded: mx.array) -> np.ndarray:
    """Decoded pictures (B, H, W, 3), about [-1, 1] -> uint8; a UserError if not finite."""
    if not mx.isfinite(decoded).all().item():
        raise UserError(
            "the model's pictures are not finite: its training has diverged, or it is damaged"
        )
    return np.array(mx.round((mx.clip(decoded, -1, 1) + 1) * 127.5).astype(mx.uint8))


def to_float(pictures: np.ndarray) -> mx.array:
    """uint8 pictures -> float32 in [-1, 1]."""
    return mx.array(pictures).astype(mx.float32) / 127.5 - 1
