"""Reconstruction and KL losses of an autoencoder."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.semantics import as_codes, is_known, nearest
from mlx_snapgen.semantics import CHANNELS, COLOR, SEEN_CHANNELS, THING, codes
from train.data.source import Batch
from train.objectives.base import LossObjective, Metrics

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""
THING_WEIGHT, COLOR_WEIGHT = 0.1, 0.2
"""Of cross-entropies in the loss; things are learned late from squares alone, colors hardly."""
UNKNOWN_SHARE = 0.3
"""Share of the pictures that a decoder with semantic latents draws from the others alone."""


@dataclass(frozen=True)
class Reconstruction(LossObjective[Autoencoder, None]):
    """L1 loss on values and on edges, and a KL term. An `Objective`.

    A batch holds `pictures` (B, H, W, C) in [-1, 1], and optionally normalized `latents` of them,
    which replace those of the model's encoder, or `seen` (B, H/f, W/f, `SEEN_CHANNELS`), what is
    where, which the encoder learns to see and of which the decoder gets the codes.

    Attributes:
        decoder_only: no gradient of the pictures reaches the encoder: only its semantic latents
            change, and only with `seen`.
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
        found = mean
        if self.decoder_only:
            mean = mx.stop_gradient(mean)
            log_var = None if log_var is None else mx.stop_gradient(log_var)
            std = DECODER_NOISE * mx.sqrt(mx.var(mean, axis=(0, 1, 2)))
        else:
            assert log_var is not None, "given latents train the decoder alone"
            std = mx.exp(0.5 * log_var)
        latents = mean + std * mx.random.normal(mean.shape, key=key)
        semantic_mse = things = colors = mx.array(0.0)
        if (seen := batch.get("seen")) is not None:
            squares = mx.square(found[..., -SEEN_CHANNELS:] - seen)
            semantic_mse = (mx.array(self.semantic_weights or (1.0,)) * squares).mean()
            things, colors = entropies(model, found[..., -SEEN_CHANNELS:], seen)
            appearance, own_key = latents[..., :-SEEN_CHANNELS], mx.random.split(key)[0]
            latents = semantic_latents(model, appearance, seen, own_key)
        error = model.decoder(latents) - x
        edges = (
            mx.abs(error[:, 1:] - error[:, :-1]).mean()
            + mx.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
        )
        l1 = mx.abs(error).mean()
        kl = mx.array(0.0)
        if log_var is not None and seen is None:
            kl = 0.5 * (mean.square() + mx.exp(log_var) - 1 - log_var).mean()
        loss = l1 + 0.5 * edges + self.kl_weight * kl
        if not self.semantics_frozen:
            loss += semantic_mse + THING_WEIGHT * things + COLOR_WEIGHT * colors
        parts = {"l1": l1, "edges": edges, "kl": kl, "noise": std.mean()}
        return loss, parts if seen is None else parts | {
            "semantic_mse": semantic_mse,
            "thing_entropy": things,
            "color_entropy": colors,
        }


def entropies(model: Autoencoder, found: mx.array, seen: mx.array) -> tuple[mx.array, mx.array]:
    """Mean cross-entropies, in nats, of the things and of their colors at the places of things.

    Args:
        found: by the encoder, (B, h, w, `SEEN_CHANNELS`).
        seen: the truth.
    """
    assert model.config.semantics is not None
    is_thing = nearest(seen[..., THING], model.config.semantics.things)[1]

    def entropy(part: slice, count: int) -> mx.array:
        index, is_there = nearest(seen[..., part], count)
        logits = found[..., part] @ mx.array(codes(part.stop - part.start)[:count]).T
        # No code is there where none has more than this, see `nearest`.
        none = mx.full((*logits.shape[:-1], 1), (part.stop - part.start) / 2)
        logits = mx.concatenate([none, logits], axis=-1)
        each = nn.losses.cross_entropy(logits, mx.where(is_there, 1 + index, 0)) * is_thing
        return each.sum() / mx.maximum(is_thing.sum(), 1)

    return entropy(THING, model.config.semantics.things), entropy(COLOR, len(codes(4)))


def semantic_latents(
    model: Autoencoder, appearance: mx.array, seen: mx.array, key: mx.array
) -> mx.array:
    """The decoder's input of known things, and, for some pictures, the same without any.

    Args:
        appearance: of the encoder (B, h, w, A).
        seen: what is where, (B, h, w, `SEEN_CHANNELS`).
    """
    assert model.config.semantics is not None
    semantics = as_codes(seen, model.config.semantics)
    other = model.config.latent_channels - CHANNELS
    appearance = appearance - mx.stop_gradient(model.decoder.table.empty)
    unknown = mx.random.uniform(shape=(len(seen), 1, 1, 1), key=key) < UNKNOWN_SHARE
    unknown = unknown | ~is_known(semantics)
    parts = [mx.where(unknown, appearance[..., :other], 0), mx.where(unknown, 0, semantics)]
    return mx.concatenate(parts, axis=-1)
