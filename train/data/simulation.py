"""Backward simulation: batches on the path of a few-step student (SnapGen++ section 3.3)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.config import ModelConfig
from mlx_snapgen.lora.adapters import active_adapters
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.picture_files import Size
from mlx_snapgen.sampling import denoise, get_schedule, guided_velocity
from train.data.conditions import Conditions
from train.data.source import Batch, PromptBatch, PromptSource
from train.data.streams import Stream

STUDENT = "student"
"""Name of the student's adapter."""
STUDENT_TEXT = ("student_text", "student_mask")
"""In a batch, the joined text (B, L, D) and mask (B, L) of student and critic."""

PromptBatches = Callable[[int, int], PromptBatch]
"""(number, count) -> batch `number` of `count` prompts."""


def sized_prompts(
    source: PromptSource,
    sizes: Sequence[Size],
    *,
    seed: int,
    weights: Sequence[float] | None = None,
) -> PromptBatches:
    """The prompts of a source; each batch has one of the sizes, at random.

    Args:
        weights: shares of the batches of each size, in any unit; None: the same for all.
    """
    shares = None if weights is None else np.array(weights) / sum(weights)

    def batch(number: int, count: int) -> PromptBatch:
        rng = Stream.SIMULATED_SIZES.generator(seed, number)
        k = rng.integers(len(sizes)) if shares is None else rng.choice(len(sizes), p=shares)
        return PromptBatch(source.prompts(number, count), sizes[int(k)])

    return batch


def prepared_prompts(source: Any, *, sizes: Sequence[Size] = (), seed: int) -> PromptBatches:
    """Captions of encoded pictures, with stored text states.

    Args:
        source: a `Prepared` set or a `Mixture` of them.
        sizes: to choose from, as in `sized_prompts`; none for that of the batch's pictures.
    """

    def batch(number: int, count: int) -> PromptBatch:
        found = source.prompt_batch(number, count)
        if sizes:
            rng = Stream.SIMULATED_SIZES.generator(seed, number)
            return replace(found, size=sizes[int(rng.integers(len(sizes)))])
        return found

    return batch


class Simulation:
    """Backward simulation: batches of x_t on the student's own path.

    A batch picks a step of the schedule, and draws with the student up to it, without gradient, as
    the model draws in its few-step mode: with the same noise levels, and with Euler steps or fresh
    noise.

    Args:
        network: has the student's adapter.
        config: the model's; `few_step` is the sampler of the student.
        teacher: encodes the prompts for the teacher.
        batch_size: prompts in a micro-batch.
        prompts: of the batches.
        share_of: step -> the student's share of the network's width.
        accumulate: micro-batches of each process in a step.
        student: encodes the prompts for the student; None if both use the teacher's text.
    """

    def __init__(
        self,
        network: EfficientDiT,
        config: ModelConfig,
        *,
        teacher: Conditions,
        batch_size: int,
        prompts: PromptBatches,
        share_of: Callable[[int], float],
        accumulate: int = 1,
        seed: int = 0,
        student: Conditions | None = None,
    ):
        assert config.few_step is not None
        self.config, self.sampler = config, config.few_step
        self.teacher, self.student = teacher, student
        self.batch_size, self.prompts, self.share_of = batch_size, prompts, share_of
        self.accumulate, self.seed = accumulate, seed

        def velocity(x_t, sigma, text, mask, share):
            with active_adapters(network, STUDENT):
                return network(x_t, sigma, text, mask, share=share)

        compiled: Any = mx.compile(velocity, inputs=network.state)
        self._velocity = lambda *arrays, share: compiled(*arrays, share)

    def __call__(self, number: int) -> Batch:
        """Batch `number`, sampled with the student's current weights."""
        # The trainer numbers batches by step, then micro-batch, then process.
        step = number // (self.accumulate * mx.distributed.init().size())
        batch = self.prompts(number, self.batch_size)
        rng = Stream.SIMULATION.generator(self.seed, number)
        levels = self.levels(batch.size)
        stop = int(rng.integers(len(levels) - 1))
        condition = self.teacher(batch.prompts, batch.states)
        text, mask = condition[:2] if self.student is None else self.student(batch.prompts)[:2]
        keys = mx.random.split(mx.random.key(int(rng.integers(2**32))), stop + 1)
        factor = self.config.autoencoder.downsampling
        height, width = (side // factor for side in batch.size)
        shape = len(batch.prompts), height, width, self.config.transformer.latent_channels

        x_t = self.path(
            text,
            mask,
            levels=levels[: stop + 1],
            share=self.share_of(step),
            noise=lambda draw: mx.random.normal(shape, key=keys[draw]),
        )
        sigma = mx.full((len(x_t),), levels[stop])
        own = dict(zip(STUDENT_TEXT, (text, mask), strict=True))
        return {"x_t": x_t, "sigma": sigma, **condition._asdict(), **own}

    def levels(self, size: Size) -> list[float]:
        """The noise levels for pictures of a size."""
        shift = self.config.time_shift(*size, few_step=True)
        return get_schedule(self.sampler.num_inference_steps, shift)

    def path(
        self,
        text: mx.array,
        mask: mx.array,
        *,
        levels: Sequence[float],
        share: float,
        noise: Callable[[int], mx.array],
    ) -> mx.array:
        """x_t (B, h, w, C) at the last of the noise levels.

        Args:
            text, mask: of the student.
            noise: 0 -> the noise at the first level; 1, 2, ... -> fresh noise (see `denoise`).
        """
        velocity = guided_velocity(self._velocity, text, mask, share=share)
        x_t = noise(0)
        fresh = noise if self.sampler.fresh_noise else None
        for step in denoise(velocity, x_t, levels, fresh):
            x_t = step.x_t
        return x_t
