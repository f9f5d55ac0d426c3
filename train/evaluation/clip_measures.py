"""Measures of drawn pictures with CLIP (`mlx_snapgen.networks.clip`): CLIP score and CMMD.

Both depend on the CLIP that is used: compare only numbers of the same one.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.clip import Clip

SIGMA = 10.0
SCALE = 1000.0
"""Bandwidth of the Gaussian kernel and factor of CMMD (arXiv 2401.09603, section 4)."""

BLOCK = 1024  # rows of a kernel matrix at a time


def embed_pictures(
    clip: Clip, pictures: Sequence[np.ndarray], *, batch_size: int = 16
) -> np.ndarray:
    """uint8 pictures (H, W, 3) of any sizes -> embeddings (N, E) of norm 1, float32."""
    starts = range(0, len(pictures), batch_size)
    batches = (clip.embed_pictures(pictures[k : k + batch_size]) for k in starts)
    return np.concatenate([np.array(batch.astype(mx.float32)) for batch in batches])


def embed_texts(clip: Clip, texts: Sequence[str], *, batch_size: int = 64) -> np.ndarray:
    """Texts -> embeddings (N, E) of norm 1, float32; texts over 75 tokens are cut, as in CLIP."""
    starts = tqdm(range(0, len(texts), batch_size), desc="CLIP: texts", unit="batch", leave=False)
    batches = (clip.embed_texts(texts[k : k + batch_size]) for k in starts)
    return np.concatenate([np.array(batch.astype(mx.float32)) for batch in batches])


def clip_score(pictures: np.ndarray, texts: np.ndarray) -> float:
    """Mean over pairs of 100 max(cos(picture, text), 0): 0 to 100, more is better.

    Hessel et al. 2021 (arXiv 2104.08718) scale by 2.5 and put "A photo depicts" before the text;
    this is the form that papers on text-to-image report, the definition of torchmetrics: a factor
    of 100 and the plain text.

    Args:
        pictures, texts: embeddings (N, E) of norm 1 of a picture and its text in each row.
    """
    cosines = (pictures.astype(np.float64) * texts).sum(axis=1)
    return float(100 * np.maximum(cosines, 0).mean())


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CLIP maximum mean discrepancy of two sets of pictures (arXiv 2401.09603); less is better.

    1000 times the squared MMD with the kernel exp(-|a - b|^2 / (2 sigma^2)), sigma 10:
    mean k(x, x') + mean k(y, y') - 2 mean k(x, y). All pairs count, those of a picture with itself
    too: the biased estimate, as in the paper's code (google-research/cmmd). It is never negative
    and, by this bias, larger for small sets: about 1000 (1 - mean k) (1 / N + 1 / M) even for equal
    distributions. The paper's numbers are of CLIP L/14 at 336 px and thousands of pictures.

    Args:
        x, y: embeddings (N, E) and (M, E) of norm 1.

    Raises:
        UserError: an empty set.
    """
    if not len(x) or not len(y):
        raise UserError("CMMD needs at least one picture in both sets")
    x, y = x.astype(np.float64), y.astype(np.float64)
    return SCALE * (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y))


def _mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of the kernel over all pairs, minus 1, which cancels: k is near 1."""
    total = 0.0
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        squares = (rows**2).sum(axis=1)[:, None] + (y**2).sum(axis=1) - 2 * rows @ y.T
        total += np.expm1(squares / (-2 * SIGMA**2)).sum()
    return total / (len(x) * len(y))
