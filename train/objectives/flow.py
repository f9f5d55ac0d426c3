"""Flow matching with elastic widths (SnapGen++ eqs. 4-5), and EDT's masking."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_snapgen.errors import UserError
from train.data.source import Batch
from train.objectives.elastic import TextToLatents, elastic_gradients, noisy
from train.objectives.losses import per_sample


def gradients(
    model: TextToLatents,
    batch: Batch,
    key: mx.array,
    widths: Sequence[float],
    shift: float,
    mask_ratio: float = 0.0,
    distillation_weight: float = 1.0,
):
    """Gradients of the full network and of the sub-networks of `widths`, balanced and added.

    Args:
        batch: `latents` (B, H, W, C), and for text encoder i `tokens_i` and `mask_i` (B, L).
        widths: the sampled sub-networks'; without any the full network trains alone.
        shift: timestep shift.
        mask_ratio: share of tokens masked in the second half of the batch.
        distillation_weight: of the full network's velocity beside the true one, for sub-networks.

    Returns:
        gradients like `model.trainable_parameters()`, and the losses as metrics; those of masked
        scenes have names of their own.
    """
    x0 = batch["latents"]
    x_t, t, v = noisy(x0, key, shift)
    keep = None
    if mask_ratio:
        patch = model.transformer.config.patch_size
        # A key that leaves t and the noise what they are without masking.
        key_mask = mx.random.split(key, 3)[2]
        keep = kept_tokens(len(x0), x0[0, ..., 0].size // patch**2, mask_ratio, key_mask)

    def loss(text: mx.array, mask: mx.array, width: float, full: mx.array | None):
        predicted = model.transformer(x_t, t, text, mask, share=width, keep=keep)
        diffusion = (predicted - v).square().mean()
        suffix = "" if full is None else f"_{width:g}"
        metrics = {f"loss{suffix}": diffusion}
        if keep is not None:
            whole, masked = mx.split(per_sample(predicted - v), [(len(x0) + 1) // 2])
            metrics = {f"loss{suffix}": whole.mean(), f"masked{suffix}": masked.mean()}
        if full is None:
            return diffusion, (predicted, metrics)
        distillation = (predicted - full).square().mean()
        metrics[f"distillation{suffix}"] = distillation
        return diffusion + distillation_weight * distillation, (predicted, metrics)

    return elastic_gradients(model, batch, widths, loss)


def kept_tokens(count: int, tokens: int, ratio: float, key: mx.array) -> mx.array:
    """Which tokens are not masked, (count, tokens): all of the first half of a batch.

    In the second half each is masked with probability `ratio`, by itself.
    """
    if count < 2:
        raise UserError("masking is for one half of a batch: give at least two scenes per batch")
    keep = mx.random.uniform(shape=(count, tokens), key=key) >= ratio
    return keep | (mx.arange(count)[:, None] < (count + 1) // 2)
