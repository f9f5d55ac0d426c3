"""Validation of fine-tuning: the loss of the pictures, and the drift on prior samples."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.lora.adapters import active_adapters
from mlx_snapgen.sampling import Progress, add_noise
from mlx_snapgen.settings import parse_width
from train.data.encoded import CHUNK, TuningBatches, rows
from train.data.source import Batch
from train.evaluation.previews import Previews
from train.loop.trainer import Trainer
from train.objectives.finetune import velocity
from train.objectives.losses import expand, per_sample

FIXED, LEVELS = 12, 4  # samples of a bucket, and noise levels, of the validation loss


class Validation:
    """After each checkpoint, with averaged weights: losses at fixed noise, and pictures."""

    def __init__(
        self,
        components: Components,
        data: TuningBatches,
        prompts: Sequence[str],
        *,
        width: str = "full",
    ):
        self.network, self.data, self.share = components.transformer, data, parse_width(width).share
        self.previews = Previews(components, prompts, widths=[width])

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        measured = [*self.data.buckets, *([self.data.prior] if self.data.prior else [])]
        total = sum(min(FIXED, len(batch["latents"])) for batch in measured)
        with trainer.averaged(), picture_bar(total, "validation loss") as progress:
            metrics = {"validation_loss": self.loss(progress)}
            if self.data.prior:
                metrics["prior_drift"] = self.drift(self.data.prior, progress)
        return metrics | self.previews(trainer)

    def loss(self, progress: Progress = lambda count: None) -> float:
        """Mean squared error of the velocity, over pictures of each size and fixed noise."""
        errors = []
        for bucket in self.data.buckets:
            for x_t, t, eps, some in _levels(bucket):
                v = velocity(self.network, some, x_t, t=t, share=self.share)
                errors.append(np.array(per_sample(v - (eps - some["latents"]))))
                progress(len(x_t) / LEVELS)
        return _mean(errors)

    def drift(self, prior: Batch, progress: Progress = lambda count: None) -> float:
        """Mean squared change of the velocity on the prior samples."""
        changes = []
        for x_t, t, _, some in _levels(prior):
            v = velocity(self.network, some, x_t, t=t, share=self.share)
            with active_adapters(self.network):
                before = velocity(self.network, some, x_t, t=t, share=self.share)
            changes.append(np.array(per_sample(v - before).astype(mx.float32)))
            progress(len(x_t) / LEVELS)
        return _mean(changes)


def _mean(values: Sequence[np.ndarray]) -> float:
    return float(np.mean(np.concatenate(values).astype(np.float64)))


def _levels(batch: Batch) -> Iterator[tuple[mx.array, mx.array, mx.array, Batch]]:
    """(x_t, t, eps, rows) over the first `FIXED` at the noise levels (k + .5) / LEVELS."""
    eps = mx.random.normal(batch["latents"][:FIXED].shape, key=mx.random.key(0))
    for start in range(0, len(eps), CHUNK):
        chunk = slice(start, start + CHUNK)
        some = rows(batch, slice(start, min(start + CHUNK, FIXED)))
        for k in range(LEVELS):
            t = mx.full((len(some["latents"]),), (k + 0.5) / LEVELS)
            x_t = add_noise(some["latents"], eps[chunk], expand(t, eps))
            yield x_t, t, eps[chunk], some
