"""Reconstruction and KL losses of an autoencoder."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from train.data.source import Batch
from train.objectives.base import LossObjective, Metrics

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""
APPEARANCE_NOISE, SEMANTIC_NOISE = 0.7, 0.3
"""The most of it with semantic latents."""
FLAT_SHARE = 0.8
"""Share of the pictures of which the decoder gets only the means of the other latents in each thing
and around them. It then learns what the things look like, while from noisy latents it copies what a
transformer blurs."""
THING_NOISE = 1.0
"""The most noise on those means that is the same in a whole thing, in standard deviations of a
channel. The decoder then takes a thing's color from its code where the means say another."""


@dataclass(frozen=True)
class Reconstruction(LossObjective[Autoencoder, None]):
    """L1 loss on values and on edges, and a KL term. An `Objective`.

    A batch holds `pictures` (B, H, W, 3) in [-1, 1], and optionally normalized `latents` of them,
    which replace those of the model's encoder, or `semantics` (B, H/f, W/f, S), which its semantic
    latents learn and the decoder gets, with `regions` (B, H/f, W/f), a number for each thing.

    Attributes:
        decoder_only: no gradient of the pictures reaches the encoder: only its semantic latents
            change, and only with `semantics`.
        semantics_frozen: they do not change either.
        semantic_weights: of their channels in the loss; () for 1.
    """

    kl_weight: float
    decoder_only: bool = False
    semantics_frozen: bool = False
    semantic_weights: tuple[float, ...] = ()

    def loss(
        self, model: Autoencoder, batch: Batch, key: mx.array, step: None
    ) -> tuple[mx.array, Metrics]:
        """See `LossObjective`."""
        x = batch["pictures"]
        if "latents" in batch:
            mean, log_var = model.denormalize(batch["latents"]), None
        else:
            mean, log_var = model.encoder(x)
        semantic_mse = mx.array(0.0)
        if (semantics := batch.get("semantics")) is not None:
            squares = mx.square(mean[..., -semantics.shape[-1] :] - semantics)
            weights = mx.array(self.semantic_weights or (1.0,))
            semantic_mse = (weights * squares).mean()
            appearance = mean[..., : -semantics.shape[-1]]
            keys = mx.random.split(mx.random.split(key)[0])
            flat = mx.random.uniform(shape=(len(x), 1, 1, 1), key=keys[0])
            means = noisy_means(appearance, batch["regions"], keys[1])
            appearance = mx.where(flat < FLAT_SHARE, means, appearance)
            mean = mx.concatenate([appearance, semantics], axis=-1)
        if self.decoder_only:
            mean = mx.stop_gradient(mean)
            log_var = None if log_var is None else mx.stop_gradient(log_var)
            std = mx.sqrt(mx.var(mean, axis=(0, 1, 2)))
            std = std * decoder_noise(model.config, len(x), mx.random.split(key)[1])
        else:
            assert log_var is not None, "given latents train the decoder alone"
            std = mx.exp(0.5 * log_var)
        latents = mean + std * mx.random.normal(mean.shape, key=key)
        error = model.decoder(latents) - x
        edges = (
            mx.abs(error[:, 1:] - error[:, :-1]).mean()
            + mx.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
        )
        l1 = mx.abs(error).mean()
        kl = mx.array(0.0)
        if log_var is not None:
            first = slice(model.config.latent_channels - model.config.semantic_channels)
            mean, log_var = mean[..., first], log_var[..., first]
            kl = 0.5 * (mean.square() + mx.exp(log_var) - 1 - log_var).mean()
        loss = l1 + 0.5 * edges + self.kl_weight * kl
        if not self.semantics_frozen:
            loss += semantic_mse
        parts = {"l1": l1, "edges": edges, "kl": kl, "noise": std.mean()}
        return loss, parts if semantics is None else parts | {"semantic_mse": semantic_mse}


def noisy_means(latents: mx.array, regions: mx.array, key: mx.array) -> mx.array:
    """Latents (B, h, w, C), each replaced by the mean over the places with its number.

    In things it gets noise that is the same in the whole thing: from picture to picture up to
    `THING_NOISE` standard deviations.

    Args:
        regions: numbers (B, h, w), 0 where no thing is.
    """
    flat = regions.reshape(len(regions), -1)
    same = (flat[:, :, None] == flat[:, None, :]).astype(latents.dtype)
    counts = same.sum(-1, keepdims=True)
    values = latents.reshape(*flat.shape, -1)
    keys = mx.random.split(key)
    most = mx.sqrt(mx.var(latents, axis=(0, 1, 2))) * (flat[..., None] > 0)
    share = THING_NOISE * mx.random.uniform(shape=(len(flat), 1, 1), key=keys[0])
    # A sum of n normal numbers has the standard deviation sqrt(n).
    noise = same @ mx.random.normal(values.shape, key=keys[1]) / mx.sqrt(counts)
    return (same @ values / counts + share * most * noise).reshape(latents.shape)


def decoder_noise(config: AutoencoderConfig, count: int, key: mx.array) -> mx.array:
    """Noise for the decoder in standard deviations of a channel, (1 or count, 1, 1, 1 or C).

    With semantic latents it differs from picture to picture.
    """
    if not config.semantic_channels:
        return mx.full((1, 1, 1, 1), DECODER_NOISE)
    most = mx.array([APPEARANCE_NOISE, SEMANTIC_NOISE])
    share = most * mx.random.uniform(shape=(count, 1, 1, 2), key=key)
    first = config.latent_channels - config.semantic_channels
    is_semantic = mx.arange(config.latent_channels) >= first
    return mx.where(is_semantic, share[..., 1:], share[..., :1])
