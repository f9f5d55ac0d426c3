"""Weights of an untrained autoencoder from the principal components of pictures.

A convolutional autoencoder with untrained residual blocks is linear, since a block starts as the
identity. The best linear autoencoder of given sizes is known: it keeps the principal components
(Baldi and Hornik, "Neural networks and principal component analysis", 1989). So training starts
with colors and coarse shapes, which random weights learn only after thousands of steps.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import depth_to_space, space_to_depth

LOG_VARIANCE = -6.0
"""Of the latents at the start: a standard deviation of 0.05, where a latent has 1."""
LEAST_STD = 0.01
"""Components below this standard deviation, relative to the first one, are not enlarged to 1."""
RIDGE = 1e-4
"""Of a least-squares fit, relative to the mean square of its inputs."""
SAMPLES = 1 << 14
"""Positions in the pictures that a layer is fitted on."""


def start_from_components(model: Autoencoder, pictures: mx.array) -> None:
    """Set the layers between the blocks of a convolutional autoencoder; the blocks are untrained.

    Each layer of the encoder keeps the principal components of its inputs. Each layer of the
    decoder is the least-squares fit to what the encoder has at that resolution. Where a layer has
    more channels than it needs, the others keep their random weights.

    Args:
        pictures: (B, H, W, C) in [-1, 1]; H and W are multiples of the model's factor.
    """
    *down, out = model.encoder.projections()
    targets = [space_to_depth(pictures, 2)]
    x = space_to_depth(pictures, 4)
    for layer in down:
        _keep_components(layer, x, len(layer.weight))
        targets.append(layer(x))
        x = space_to_depth(targets[-1], 2)
    x = targets[-1]
    channels = model.config.latent_channels
    _keep_components(out, x, channels, whiten=True)
    out.weight[channels:], out.bias[channels:] = 0, LOG_VARIANCE
    x = out(x)[..., :channels]

    inp, *up, out = model.decoder.projections()
    _fit(inp, x, targets.pop())
    x = inp(x)
    for layer in up:
        target = targets.pop()
        _fit(layer, x, space_to_depth(target, 2), cells=4)
        x = depth_to_space(layer(x), 2)
    _fit(out, x, space_to_depth(pictures, 2), cells=4)


def _keep_components(layer: nn.Linear, x: mx.array, count: int, *, whiten: bool = False) -> None:
    """Make the first outputs of a layer the first principal components of its inputs.

    Args:
        x: (..., inputs).
        whiten: all components get a standard deviation of 1, instead of all together.
    """
    rows = _rows(x)
    mean = rows.mean(0)
    variances, axes = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    count = min(count, len(axes))
    std = np.sqrt(np.maximum(variances[::-1][:count], 0))
    std = np.maximum(std, LEAST_STD * max(std[0], 1e-6))
    scale = 1 / (std if whiten else np.sqrt(np.mean(std**2)))
    weight = axes.T[::-1][:count] * np.reshape(scale, (-1, 1))
    layer.weight[:count] = mx.array(weight.astype(np.float32))
    layer.bias[:count] = mx.array((-weight @ mean).astype(np.float32))


def _fit(layer: nn.Linear | nn.Conv2d, x: mx.array, target: mx.array, *, cells: int = 1) -> None:
    """Fit a layer by least squares, in float64.

    Args:
        x: (B, H, W, inputs).
        target: (B, H, W, cells * channels); the layer may have more or fewer channels per cell.
    """
    # Whole pictures, since a convolution also reads the neighbors.
    apart = max(1, math.prod(x.shape[:3]) // SAMPLES)
    x, target = x[::apart], target[::apart]
    side = 1 if isinstance(layer, nn.Linear) else layer.weight.shape[1]
    rows = _rows(_neighbors(x, side))
    mean, outputs = rows.mean(0), _rows(target)
    rows = rows - mean
    squares = rows.T @ rows
    # Flat pictures have no squares.
    squares += (RIDGE * np.trace(squares) / len(squares) + 1e-9) * np.eye(len(squares))
    weight = np.linalg.solve(squares, rows.T @ (outputs - outputs.mean(0))).T
    bias = outputs.mean(0) - weight @ mean
    shape = (cells, -1, *layer.weight.shape[1:])
    weights, biases = layer.weight.reshape(shape), layer.bias.reshape(cells, -1)
    count = min(weights.shape[1], target.shape[-1] // cells)
    weight, bias = weight.reshape(shape)[:, :count], bias.reshape(cells, -1)[:, :count]
    weights[:, :count] = mx.array(weight.astype(np.float32))
    biases[:, :count] = mx.array(bias.astype(np.float32))
    layer.weight, layer.bias = weights.reshape(layer.weight.shape), biases.reshape(-1)


def _neighbors(x: mx.array, side: int) -> mx.array:
    """(B, H, W, C) -> (B, H, W, side * side * C), as a convolution with zero padding reads it."""
    around, (_, h, w, _) = side // 2, x.shape
    x = mx.pad(x, [(0, 0), (around, around), (around, around), (0, 0)])
    return mx.concatenate(
        [x[:, i : i + h, j : j + w] for i in range(side) for j in range(side)], axis=-1
    )


def _rows(x: mx.array) -> np.ndarray:
    """(..., C) -> at most `SAMPLES` of the vectors, (n, C) in float64; the same for each length."""
    x = x.reshape(-1, x.shape[-1])
    if len(x) > SAMPLES:
        chosen = np.random.default_rng(0).choice(len(x), SAMPLES, replace=False)
        x = x[mx.array(np.sort(chosen))]
    return np.array(x, np.float64)
