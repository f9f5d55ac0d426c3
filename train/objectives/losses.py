"""What the losses of all objectives share. Arrays are (B, ...); t is (B,)."""

import mlx.core as mx


def expand(t: mx.array, like: mx.array) -> mx.array:
    """t (B,) with trailing axes of length 1, to multiply an array shaped like `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def per_sample(error: mx.array) -> mx.array:
    """Mean square of each sample: (B, ...) -> (B,)."""
    return error.square().mean(axis=tuple(range(1, error.ndim)))
