"""Reconstruction and KL losses of an autoencoder."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from train.data.source import Batch
from train.objectives.base import LossObjective, Metrics

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""


@dataclass(frozen=True)
class Reconstruction(LossObjective[Autoencoder, None]):
    """L1 loss on values and on edges, and a KL term. An `Objective`.

    A batch holds `pictures` (B, H, W, 3) in [-1, 1], and optionally normalized `latents` of them,
    which replace those of the model's encoder.

    Attributes:
        decoder_only: no gradient reaches the encoder, whose weights do not change.
    """

    kl_weight: float
    decoder_only: bool = False

    def loss(
        self, model: Autoencoder, batch: Batch, key: mx.array, step: None
    ) -> tuple[mx.array, Metrics]:
        """See `LossObjective`."""
        x = batch["pictures"]
        if "latents" in batch:
            mean, log_var = model.denormalize(batch["latents"]), None
        else:
            mean, log_var = model.encoder(x)
        if self.decoder_only:
            mean = mx.stop_gradient(mean)
            log_var = None if log_var is None else mx.stop_gradient(log_var)
            std = DECODER_NOISE * mx.sqrt(mx.var(mean, axis=(0, 1, 2)))
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
            kl = 0.5 * (mean.square() + mx.exp(log_var) - 1 - log_var).mean()
        loss = l1 + 0.5 * edges + self.kl_weight * kl
        return loss, {"l1": l1, "edges": edges, "kl": kl, "noise": std.mean()}
