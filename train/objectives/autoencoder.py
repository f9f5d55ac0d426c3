"""Reconstruction and KL losses of an autoencoder."""

import mlx.core as mx

from mlx_snapgen.networks.autoencoders.base import Autoencoder

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""


def gradients(
    model: Autoencoder, batch: dict, key: mx.array, kl_weight: float, decoder_only: bool = False
):
    """Reconstruction and KL loss of one batch of crops.

    With `decoder_only` no gradient reaches the encoder, and its weights stay as they are.
    Normalised `latents` in the batch stand for what it says.
    """

    def loss_fn(params):
        model.update(params)
        x = batch["pictures"]
        if "latents" in batch:
            mean, log_var = model.denormalize(batch["latents"]), None
        else:
            mean, log_var = model.encoder(x)
        if decoder_only:
            mean = mx.stop_gradient(mean)
            log_var = None if log_var is None else mx.stop_gradient(log_var)
            std = DECODER_NOISE * mx.sqrt(mx.var(mean, axis=(0, 1, 2)))
        else:
            std = mx.exp(0.5 * log_var)
        latents = mean + std * mx.random.normal(mean.shape, key=key)
        y = model.decoder(latents)
        error = y - x
        edges = (
            mx.abs(error[:, 1:] - error[:, :-1]).mean()
            + mx.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
        )
        reconstruction = mx.abs(error).mean()
        kl = mx.array(0.0)
        if log_var is not None:
            kl = 0.5 * (mean.square() + mx.exp(log_var) - 1 - log_var).mean()
        loss = reconstruction + 0.5 * edges + kl_weight * kl
        noise = std.mean()
        return loss, {"l1": reconstruction, "edges": edges, "kl": kl, "noise": noise}

    (_, metrics), grads = mx.value_and_grad(loss_fn)(model.trainable_parameters())
    return grads, metrics
