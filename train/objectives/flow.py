"""Flow matching with elastic widths (SnapGen++ eqs. 4-5), and EDT's masking training."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_snapgen.errors import UserError
from train.data.source import Batch
from train.objectives.base import Metrics
from train.objectives.elastic import ElasticStep, TextToLatents, elastic_gradients, noisy
from train.objectives.losses import per_sample


@dataclass(frozen=True)
class Flow:
    """The velocity; sub-networks also learn from the full network. An `Objective`.

    Attributes:
        mask_ratio: share of tokens masked in the second half of the batch.
        distillation_weight: of the full network's velocity beside the true one, for sub-networks.
        weights: of the latents' channels, see `channel_weights`; None: all alike.
    """

    mask_ratio: float = 0.0
    distillation_weight: float = 1.0
    weights: mx.array | None = None

    def gradients(
        self, model: TextToLatents, batch: Batch, key: mx.array, step: ElasticStep
    ) -> tuple[dict[str, Any], Metrics]:
        """Gradients of the full network and of the step's sub-networks, balanced and added.

        Args:
            batch: `latents` (B, H, W, C), and the text as in `elastic_gradients`.

        Returns:
            gradients like `model.trainable_parameters()`, and the losses as metrics; those of
            masked samples have separate names.
        """
        x0 = batch["latents"]
        patch, keep = model.transformer.config.patch_size, None
        x_t, t, v = noisy(x0, key, shift=step.shift, patch_size=patch, early=step.early)
        if self.mask_ratio:
            # A further key, so that t and the noise are the same as without masking.
            key_mask = mx.random.split(key, 3)[2]
            tokens = x0[0, ..., 0].size // patch**2
            keep = kept_tokens(len(x0), tokens, ratio=self.mask_ratio, key=key_mask)

        def loss(text: mx.array, mask: mx.array, share: float, full: mx.array | None):
            predicted = model.transformer(x_t, t, text, mask, share=share, keep=keep)
            diffusion = per_sample(predicted - v, self.weights).mean()
            suffix = "" if full is None else f"_{share:g}"
            metrics = {f"loss{suffix}": diffusion}
            if keep is not None:
                errors = per_sample(predicted - v, self.weights)
                whole, masked = mx.split(errors, [(len(x0) + 1) // 2])
                metrics = {f"loss{suffix}": whole.mean(), f"masked{suffix}": masked.mean()}
            if full is None:
                return diffusion, (predicted, metrics)
            distillation = per_sample(predicted - full, self.weights).mean()
            metrics[f"distillation{suffix}"] = distillation
            return diffusion + self.distillation_weight * distillation, (predicted, metrics)

        return elastic_gradients(model, batch, shares=step.shares, loss=loss)


def kept_tokens(count: int, tokens: int, *, ratio: float, key: mx.array) -> mx.array:
    """Which tokens are not masked, (count, tokens): all of the first half of a batch.

    In the second half each is masked with probability `ratio`, independently.
    """
    if count < 2:
        raise UserError("masking is for one half of a batch: give at least two samples per batch")
    keep = mx.random.uniform(shape=(count, tokens), key=key) >= ratio
    return keep | (mx.arange(count)[:, None] < (count + 1) // 2)
