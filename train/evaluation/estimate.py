"""Time and memory of a run, measured on this machine."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import plural
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.settings import DrawSettings, machine_memory
from train.data.encoded import rows
from train.data.source import Batch
from train.objectives.base import ShareStep
from train.objectives.finetune import FineTuning


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a run.

    Attributes:
        step: seconds of a step.
        picture: seconds to draw a picture.
        memory: peak memory in bytes.
    """

    step: float
    picture: float
    memory: int

    def text(self, steps: int, pictures: int) -> str:
        """Text like "about 4 minutes (400 steps of 0.60 s, 56 pictures of 0.5 s), 0.3 GB"."""
        seconds = steps * self.step + pictures * self.picture
        if seconds < 100:
            long = plural(round(seconds), "second")
        elif seconds < 6000:
            long = plural(round(seconds / 60), "minute")
        else:
            long = f"{seconds / 3600:.1f} hours"
        return (
            f"about {long} ({plural(steps, 'step')} of {self.step:.2f} s, "
            f"{plural(pictures, 'picture')} to draw of {self.picture:.1f} s) and "
            f"{self.memory / 1e9:.1f} GB of memory"
        )


def estimate(
    components: Components, batch: Batch, *, shares: Mapping[float, float], accumulate: int = 1
) -> Estimate:
    """Measure a step and a picture, without changing the model.

    Memory is extrapolated from one sample to a batch. If the machine has less than that, the time
    of a step is extrapolated from one sample too.

    Args:
        batch: a batch of the training data.
        shares: share of the network's width -> fraction of the steps that train it; they add up to
            1.
        accumulate: batches in a step.
    """
    network, widest = components.transformer, max(shares)
    objective = FineTuning(shift=1.0, prior_weight=1.0)

    def count(some: Batch) -> int:
        return sum(len(value) for name, value in some.items() if name.endswith("latents"))

    def seconds(some: Batch, share: float) -> float:
        started = time.perf_counter()
        mx.eval(objective.gradients(network, some, mx.random.key(0), ShareStep(share)))
        return time.perf_counter() - started

    one = rows(batch, slice(1))
    mx.eval(components.modules(), batch, one)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds(one, widest)
    each = (mx.get_peak_memory() - before) / count(one)
    trained = num_trainable(network)
    # Beside float32 gradients: averages, and two moments of the optimizer.
    memory = round(before + count(batch) * each + 16 * trained)
    some, times = (one, count(batch) / count(one)) if memory > machine_memory() else (batch, 1)
    # The first step at a width is slower than the next ones.
    step = sum(
        often * times * min(seconds(some, share) for _ in range(2))
        for share, often in shares.items()
    )
    _draw_one(components, widest, 1)
    started = time.perf_counter()
    _draw_one(components, widest, 4)
    picture = (time.perf_counter() - started) / 4 * components.config.sampler.num_inference_steps
    return Estimate(accumulate * step, picture, memory)


def num_trainable(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.size for p in flat_parameters(module.trainable_parameters()).values())


def _draw_one(components: Components, share: float, steps: int) -> None:
    settings = DrawSettings(num_inference_steps=steps)
    draw_pictures(components, ["a"], seeds=[0], settings=settings, share=share)
