"""Projectors phi of feature distillation (SnapGen++ eq. 7), from student to teacher features.

Each elastic width has its own, a linear layer.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_snapgen.errors import UserError
from train.data.source import Batch


def new_projectors(
    hidden_size: int, shares: Sequence[float], *, feature_dims: int
) -> list[nn.Linear]:
    """Random projectors (share * hidden_size) -> feature_dims, in the order of `shares`."""
    return [nn.Linear(round(hidden_size * share), feature_dims) for share in shares]


def fit_projectors(
    projectors: Sequence[nn.Linear],
    shares: Sequence[float],
    *,
    batches: Sequence[Batch],
    student: Callable[[Batch, float], mx.array],
    teacher: Callable[[Batch], mx.array],
) -> None:
    """Initialize each width's projector by least squares to the teacher's features.

    The gradient through a random projector would disturb a trained student.

    Args:
        shares: those of `projectors`.
        student: (batch, share) -> the student's features (B, N, share * D).
        teacher: batch -> the teacher's features (B, N, feature_dims).
    """
    with tqdm(total=len(projectors) + 1, desc="fitting projectors", leave=False) as bar:
        theirs = [teacher(batch) for batch in batches]
        wanted = _rows(theirs)
        bar.update()
        for share, projector in zip(shares, projectors, strict=True):
            ours = [student(batch, share) for batch in batches]
            check_same_tokens(ours[0], theirs[0])
            given = _rows(ours)
            given = np.concatenate([given, np.ones_like(given[:, :1])], axis=1)
            solution = np.linalg.lstsq(given, wanted, rcond=None)[0]
            projector.weight = mx.array(solution[:-1].T)
            projector.bias = mx.array(solution[-1])
            bar.update()


def check_same_tokens(student: mx.array, teacher: mx.array) -> None:
    """`UserError` unless student and teacher have features (B, N, ...) of as many tokens."""
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"the student has features of {student.shape[1]} tokens, its teacher of "
            f"{teacher.shape[1]}: give it the teacher's patch size"
        )


def _rows(features: Sequence[mx.array]) -> np.ndarray:
    """Features (B, N, D) of all batches as one matrix of D columns."""
    flat = (f.reshape(-1, f.shape[-1]).astype(mx.float32) for f in features)
    return np.concatenate([np.array(f) for f in flat])
