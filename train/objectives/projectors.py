"""Projectors phi of feature distillation (SnapGen++ eq. 7): student features to the teacher's.

Each elastic width has one of its own, a linear layer.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.errors import UserError
from train.data.source import Batch


def new_projectors(hidden_size: int, widths: Sequence[float], feature_dims: int) -> list[nn.Linear]:
    """Random projectors (width * hidden_size) -> feature_dims, in the order of `widths`."""
    return [nn.Linear(round(hidden_size * width), feature_dims) for width in widths]


def fit_projectors(
    projectors: Sequence[nn.Linear],
    widths: Sequence[float],
    batches: Sequence[Batch],
    own: Callable[[Batch, float], mx.array],
    seen: Callable[[Batch], mx.array],
) -> None:
    """Start each width's projector at the least-squares fit to the teacher's features.

    A random projection would push a trained student about until it is learned itself.

    Args:
        widths: those of `projectors`.
        own: (batch, width) -> the student's features (B, N, width * D).
        seen: batch -> the teacher's (B, N, feature_dims).
    """
    theirs = [seen(batch) for batch in batches]
    wanted = _rows(theirs)
    for width, projector in zip(widths, projectors, strict=True):
        ours = [own(batch, width) for batch in batches]
        check_same_tokens(ours[0], theirs[0])
        given = _rows(ours)
        given = np.concatenate([given, np.ones_like(given[:, :1])], axis=1)
        solution = np.linalg.lstsq(given, wanted, rcond=None)[0]
        projector.weight = mx.array(solution[:-1].T)
        projector.bias = mx.array(solution[-1])


def check_same_tokens(own: mx.array, seen: mx.array) -> None:
    """`UserError` unless student and teacher have features (B, N, ...) of as many tokens."""
    if own.shape[1] != seen.shape[1]:
        raise UserError(
            f"the student has features of {own.shape[1]} tokens, its teacher of "
            f"{seen.shape[1]}: give it the teacher's patch size"
        )


def _rows(features: Sequence[mx.array]) -> np.ndarray:
    """Features (B, N, D) of all batches as one matrix of D columns."""
    flat = (f.reshape(-1, f.shape[-1]).astype(mx.float32) for f in features)
    return np.concatenate([np.array(f) for f in flat])
