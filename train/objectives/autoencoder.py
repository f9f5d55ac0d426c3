"""Reconstruction and KL losses of an autoencoder."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.semantics import as_codes, is_known, nearest
from mlx_snapgen.semantics import CHANNELS, COLOR, GROUND, SEEN_CHANNELS, THING, codes
from train.data.source import Batch
from train.objectives.base import LossObjective, Metrics

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""
ENTROPIES = {"thing": (THING, 0.1), "color": (COLOR, 0.2), "ground": (GROUND, 0.2)}
"""Channels and weights of cross-entropies in the loss: things are learned late from squares alone,
colors hardly, and the background is seen through what is unknown."""
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
        semantic: Metrics = {}
        if (seen := batch.get("seen")) is not None:
            squares = mx.square(found[..., -SEEN_CHANNELS:] - seen)
            semantic["semantic_mse"] = (mx.array(self.semantic_weights or (1.0,)) * squares).mean()
            semantic |= entropies(model, found[..., -SEEN_CHANNELS:], seen)
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
        if semantic and not self.semantics_frozen:
            loss += semantic["semantic_mse"]
            for name, (_, weight) in ENTROPIES.items():
                loss += weight * semantic[f"{name}_entropy"]
        parts = {"l1": l1, "edges": edges, "kl": kl, "noise": std.mean()}
        return loss, parts | semantic


def entropies(model: Autoencoder, found: mx.array, seen: mx.array) -> Metrics:
    """Mean cross-entropies of `ENTROPIES`, in nats; no code at all counts as one more.

    Things are also compared where nothing is known, colors only where things are.

    Args:
        found: by the encoder, (B, h, w, `SEEN_CHANNELS`).
        seen: the truth.
    """
    assert model.config.semantics is not None
    things = model.config.semantics.things
    is_thing = nearest(seen[..., THING], things)[1]
    where = {"thing": is_thing | ~is_known(seen)[..., 0], "color": is_thing}
    result = {}
    for name, (part, _) in ENTROPIES.items():
        size = part.stop - part.start
        known = codes(size)[: things if name == "thing" else None]
        index, is_there = nearest(seen[..., part], len(known))
        logits = found[..., part] @ mx.array(known).T
        # No code is there where none has more than this, see `nearest`.
        none = mx.full((*logits.shape[:-1], 1), size / 2)
        logits = mx.concatenate([none, logits], axis=-1)
        each = nn.losses.cross_entropy(logits, mx.where(is_there, 1 + index, 0))
        at = where.get(name, mx.ones_like(is_thing))
        result[f"{name}_entropy"] = (each * at).sum() / mx.maximum(at.sum(), 1)
    return result


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
