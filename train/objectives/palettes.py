"""Fine-tuning of biases and norms of a network with palettes (SnapGen++ section 6)."""

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.efficient_dit import EfficientDiT
from train.data.source import Batch
from train.objectives.base import LossObjective, Metrics, ShareStep
from train.objectives.losses import per_sample


def train_biases_and_norms(network: EfficientDiT, shares: Collection[float]) -> None:
    """Freeze everything except the biases and norms of some widths.

    The text projections are frozen, because they do not run with the network. Parameters that only
    other widths have are frozen too: they have no gradient, but averaging would round them.
    """
    network.freeze()
    held = network.config.widths
    others = [f".members.{i}." for i, share in enumerate(held) if share not in shares]
    for path, module in network.named_modules():
        if path.startswith("text.") or any(part in f"{path}." for part in others):
            continue
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.unfreeze(recurse=False)
        elif "bias" in module:
            module.unfreeze(recurse=False, keys="bias")


class PaletteTuning(LossObjective[EfficientDiT, ShareStep]):
    """The velocity of the network without palettes; batches are those of `Trajectories`."""

    def loss(
        self, model: EfficientDiT, batch: Batch, key: mx.array, step: ShareStep
    ) -> tuple[mx.array, Metrics]:
        """See `LossObjective`."""
        v = model(batch["x_t"], batch["t"], batch["text"], batch["mask"], share=step.share)
        loss = per_sample(v - batch["v"]).mean()
        return loss, {f"loss_{step.share:g}": loss}
