"""What the losses of all objectives share. Arrays are (B, ...); t is (B,)."""

import mlx.core as mx

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder

SIDE = 32
"""Rows and columns of latents that `channel_weights` decodes at most."""
NOISE = 0.3
"""Of the change of a channel there; latents have a standard deviation of about 1."""
MEASURED = 4
"""Pictures that it decodes for each channel."""


def expand(t: mx.array, like: mx.array) -> mx.array:
    """t (B,) with trailing axes of length 1, to multiply an array shaped like `like`."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def per_sample(error: mx.array, weights: mx.array | None = None) -> mx.array:
    """Mean square of each sample: (B, ..., C) -> (B,).

    Args:
        weights: (C,), of the channels, with mean 1; None: all alike.
    """
    squares = error.square() if weights is None else weights * error.square()
    return squares.mean(axis=tuple(range(1, error.ndim)))


def channel_weights(
    autoencoder: Autoencoder, latents: mx.array, *, power: float
) -> mx.array | None:
    """Weights (C,) of the latents' channels in a loss, with mean 1; None if `power` is 0.

    All channels have the same variance, but not the same share in a picture: of principal
    components, the first alone may have nine tenths. A weight is the mean square by which noise in
    its channel changes the decoded picture, to `power`.

    Args:
        latents: (B, h, w, C) of pictures.

    Raises:
        UserError: no channel changes the picture, or one does so without a limit; semantic latents,
            of which small changes change nothing.
    """
    if not power:
        return None
    if autoencoder.config.semantics:
        raise UserError(
            "--channel-weights: semantic latents mean the same with noise: leave the option out"
        )
    latents = latents[:, :SIDE, :SIDE].astype(mx.float32)
    plain = autoencoder.decode(latents)
    noise = NOISE * mx.random.normal(latents.shape, key=mx.random.key(0))
    changes = []
    for channel in range(latents.shape[-1]):
        own = mx.where(mx.arange(latents.shape[-1]) == channel, noise, 0)
        change = autoencoder.decode(latents + own) - plain
        changes.append(change.astype(mx.float32).square().mean())
        mx.eval(changes[-1])
    weights = mx.stack(changes) ** power
    weights = weights / weights.mean()
    if not mx.isfinite(weights).all().item():
        raise UserError(
            "--channel-weights: the autoencoder decodes all latents to the same picture, or to "
            "infinite values: leave the option out, or use a trained autoencoder"
        )
    return weights
