"""Projectors phi of feature distillation (SnapGen++ eq. 7), from student to teacher features.

Each elastic width has its own, a linear layer.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
    batches: Iterable[Batch],
    student: Callable[[Batch, float], mx.array],
    teacher: Callable[[Batch], mx.array],
) -> None:
    """Initialize each width's projector by least squares to the teacher's features.

    The gradient through a random projector would disturb a trained student. Memory does not grow
    with the number of batches.

    Args:
        shares: those of `projectors`.
        student: (batch, share) -> the student's features (B, N, share * D).
        teacher: batch -> the teacher's features (B, N, feature_dims).
    """
    fits = [LeastSquares() for _ in projectors]
    for batch in batches:
        theirs = teacher(batch)
        wanted = _rows(theirs)
        for share, fit in zip(shares, fits, strict=True):
            ours = student(batch, share)
            check_same_tokens(ours, theirs)
            fit.add(_rows(ours), wanted)
    for projector, fit in zip(projectors, fits, strict=True):
        weight, bias = fit.solution()
        projector.weight, projector.bias = mx.array(weight.T), mx.array(bias)


class LeastSquares:
    """A linear fit Y = X W + b over rows that are added in parts.

    It holds sums of products in float64, (D, D) and (D, E), but no rows. Where X does not determine
    W, as with fewer rows than columns, a small ridge gives a solution with small numbers.
    """

    RIDGE = 1e-10
    """Of the mean variance of X."""
    CHUNK = 4096
    """Rows in float64 at a time."""

    def __init__(self):
        self.count = 0
        self.sums: list[np.ndarray] = []

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Rows x (N, D) and y (N, E)."""
        if not self.count:
            # Sums of numbers around 0 are more accurate.
            self.origin = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
        for start in range(0, len(x), self.CHUNK):
            rows = slice(start, start + self.CHUNK)
            u, v = x[rows] - self.origin[0], y[rows] - self.origin[1]
            sums = [u.sum(0), v.sum(0), u.T @ u, u.T @ v]
            self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.count += len(x)

    def solution(self) -> tuple[np.ndarray, np.ndarray]:
        """W (D, E) and b (E,), float32."""
        (x, y), (square, product) = (s / self.count for s in self.sums[:2]), self.sums[2:]
        square = square / self.count - np.outer(x, x)
        product = product / self.count - np.outer(x, y)
        ridge = max(self.RIDGE * np.trace(square) / len(x), np.finfo(np.float64).tiny)
        weight = np.linalg.solve(square + ridge * np.eye(len(x)), product)
        bias = self.origin[1] + y - (self.origin[0] + x) @ weight
        return weight.astype(np.float32), bias.astype(np.float32)


def only_projectors(
    gradients: list[dict[str, mx.array]], chosen: Collection[int]
) -> list[tuple[str, mx.array]]:
    """Paths in the model and gradients of the chosen projectors.

    The others have a gradient of zero, which their optimizers must not count as a step.
    """
    return [(f"projectors.{i}.{k}", g) for i in chosen for k, g in gradients[i].items()]


def check_same_tokens(student: mx.array, teacher: mx.array) -> None:
    """`UserError` unless student and teacher have features (B, N, ...) of as many tokens."""
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"the student has features of {student.shape[1]} tokens, its teacher of "
            f"{teacher.shape[1]}: give it the teacher's patch size"
        )


def _rows(features: mx.array) -> np.ndarray:
    """Features (B, N, D) as float32 rows (B * N, D)."""
    return np.array(features.reshape(-1, features.shape[-1]).astype(mx.float32))
