"""Biases and norms tuned to palettes (SnapGen++ section 6)."""

from collections.abc import Collection

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.efficient_dit import EfficientDiT
from train.data.source import Batch
from train.objectives.losses import per_sample


def train_biases_and_norms(network: EfficientDiT, widths: Collection[float]) -> None:
    """Freeze all but the biases and norms of some widths.

    The text projections stay, which do not run with the network, and what other widths alone have:
    it would not learn, but an average rounds.
    """
    network.freeze()
    held = network.config.widths
    others = [f".members.{i}." for i, width in enumerate(held) if width not in widths]
    for path, module in network.named_modules():
        if path.startswith("text.") or any(part in f"{path}." for part in others):
            continue
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.unfreeze(recurse=False)
        elif "bias" in module:
            module.unfreeze(recurse=False, keys="bias")


def gradients(network: EfficientDiT, batch: Batch, key: mx.array, width: float):
    """Gradients of one width, as `Trainer` takes them; `batch` is as `Trajectories` makes it."""

    def loss_fn(params):
        network.update(params)
        v = network(batch["x_t"], batch["t"], batch["text"], batch["mask"], share=width)
        loss = per_sample(v - batch["v"]).mean()
        return loss, {f"loss_{width:g}": loss}

    params = network.trainable_parameters()
    (_, metrics), grads = mx.value_and_grad(loss_fn)(params)
    network.update(params)
    return grads, metrics
