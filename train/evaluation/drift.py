"""Validation of fine-tuning: the pictures' loss, and how far the model drifts from what it knew."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.lora.adapters import acting
from mlx_snapgen.settings import parse_width
from train.data.encoded import CHUNK, Pictures, rows
from train.data.source import Batch
from train.evaluation.previews import Previews
from train.loop.trainer import Trainer
from train.objectives.finetune import velocity
from train.objectives.losses import add_noise, per_sample

FIXED, LEVELS = 12, 4  # samples of a bucket, and noise levels, of the validation loss


class Validation:
    """After each checkpoint: pictures of `prompts`, and losses at fixed noise, of the averages."""

    def __init__(
        self, components: Components, data: Pictures, prompts: Sequence[str], width: str = "full"
    ):
        self.network, self.data, self.width = components.transformer, data, parse_width(width).share
        self.previews = Previews(components, [width], prompts)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        current = self.network.trainable_parameters()
        self.network.update(trainer.ema_parameters)
        try:
            metrics = {"validation_loss": self.loss()}
            if self.data.prior:
                metrics["prior_drift"] = self.drift()
        finally:
            self.network.update(current)
        return metrics | self.previews(trainer)

    def loss(self) -> float:
        """Mean squared error of the velocity, over pictures of each size and fixed noise."""
        errors = []
        for bucket in self.data.buckets:
            for x_t, t, eps, some in _levels(bucket):
                v = velocity(self.network, some, x_t, t, self.width)
                errors += per_sample(v - (eps - some["latents"])).tolist()
        return float(np.mean(errors))

    def drift(self) -> float:
        """Mean squared change of the velocity on the prior samples."""
        changes = []
        for x_t, t, _, some in _levels(self.data.prior):
            v = velocity(self.network, some, x_t, t, self.width)
            with acting(self.network):
                before = velocity(self.network, some, x_t, t, self.width)
            changes += per_sample(v - before).tolist()
        return float(np.mean(changes))


def _levels(batch: Batch) -> Iterator[tuple[mx.array, mx.array, mx.array, Batch]]:
    """(x_t, t, eps, rows) over the first `FIXED` at the noise levels (k + .5) / LEVELS."""
    eps = mx.random.normal(batch["latents"][:FIXED].shape, key=mx.random.key(0))
    for start in range(0, len(eps), CHUNK):
        chunk = slice(start, start + CHUNK)
        some = rows(batch, slice(start, min(start + CHUNK, FIXED)))
        for k in range(LEVELS):
            t = mx.full((len(some["latents"]),), (k + 0.5) / LEVELS)
            yield add_noise(some["latents"], eps[chunk], t), t, eps[chunk], some
