"""LoRAs of public models: memory, time, validation loss, and previews."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.memory import BASE_BYTES
from mlx_snapgen.cli.notices import announce, picture_bar
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.pictures import contact_sheet, to_uint8
from mlx_snapgen.sampling import Progress, add_noise, last_step
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.draw import denoise_public
from mlx_snapgen.teachers.flow import FlowTeacher
from mlx_snapgen.teachers.folder import TeacherFolder, load_teacher_autoencoder
from mlx_snapgen.teachers.memory import TEXT_TOKENS, float_bytes, measure_folder
from train.data.public import PublicPictures
from train.evaluation.estimate import Estimate, num_trainable
from train.loop.trainer import Trainer
from train.objectives.finetune import PublicFineTuning
from train.objectives.losses import expand, per_sample

FIXED, LEVELS = 4, 4
"""Pictures of each size, and noise levels, of the validation loss."""
TRAINED_BYTES = 20
"""Of a trained number: float32 weight, average, gradient and two moments of the optimizer."""
BLOCK_NUMBERS = 90
"""Numbers of a block in memory during its backward pass, in hidden sizes per token. A step of
FLUX.2 klein with 3 of its 25 blocks, in 4 bits at 512 pixels on the CPU, took 3.1 GiB; the estimate
is 3.6."""


def training_memory(
    folder: TeacherFolder, network: Any, *, size: tuple[int, int], batch_size: int, texts: int
) -> int:
    """Peak memory of training in bytes, from sizes alone; blocks are checkpointed.

    Args:
        network: with its adapters; the arrays may be lazy.
        size: height and width of the pictures in pixels.
        texts: number of different captions and prompts.
    """
    sizes, config = measure_folder(folder), folder.config
    tokens = batch_size * (size[0] * size[1] // config.size_unit**2 + TEXT_TOKENS)
    blocks = sum(len(network[name]) for name in network.BLOCKS)
    stored = tokens * config.transformer.hidden_size * float_bytes()
    return (
        BASE_BYTES
        + sizes.network
        + sizes.unpacked
        + num_trainable(network) * TRAINED_BYTES
        + (blocks + BLOCK_NUMBERS) * stored
        + texts * TEXT_TOKENS * config.transformer.text_dims * float_bytes()
    )


class PublicValidation:
    """After each checkpoint, with averaged weights: the loss at fixed noise, and pictures.

    Args:
        network: with the adapter that is trained.
        prompts: prompts of the pictures; `data` has encoded them.
    """

    def __init__(
        self,
        folder: TeacherFolder,
        network: Any,
        data: PublicPictures,
        *,
        prompts: Sequence[str],
    ):
        self.folder, self.data, self.prompts = folder, data, list(prompts)
        self.network, self.teacher = network, FlowTeacher(folder.config, network, prompts=None)
        pixels = folder.config.autoencoder.downsampling
        height, width = (side * pixels for side in data.latents[0].shape[1:3])
        settings = DrawSettings(height=height, width=width, few_step=False)
        self.settings = settings.resolved(folder.config)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        self.network.checkpoint_blocks(False)
        measured = sum(min(FIXED, len(latents)) for latents in self.data.latents)
        with trainer.averaged():
            with picture_bar(measured, "validation loss") as progress:
                metrics = {"validation_loss": self.loss(progress)}
            with picture_bar(len(self.prompts), "sample pictures") as progress:
                latents = [
                    self.draw(prompt, seed=k, progress=progress)
                    for k, prompt in enumerate(self.prompts)
                ]
        self.network.checkpoint_blocks()
        mx.clear_cache()
        with announce("decoding the sample pictures ..."):
            autoencoder = load_teacher_autoencoder(self.folder.path, self.folder.config)
            pictures = [to_uint8(autoencoder.decode(x0))[0] for x0 in latents]
        if pictures:
            sheet = contact_sheet(pictures, self.prompts, columns=len(pictures))
            sheet.save(trainer.sample_path("previews"))
        del autoencoder
        mx.clear_cache()
        return metrics

    def loss(self, progress: Progress = lambda count: None) -> float:
        """Mean squared error of the velocity, over pictures of each size and fixed noise."""
        errors = []
        for bucket, latents in enumerate(self.data.latents):
            for row in range(min(FIXED, len(latents))):
                some = self.data.rows(bucket, [row], [self.data.captions[bucket][row]])
                x0 = some["latents"]
                eps = mx.random.normal(x0.shape, key=mx.random.key(row))
                for k in range(LEVELS):
                    t = mx.full((1,), (k + 0.5) / LEVELS)
                    x_t = add_noise(x0, eps, expand(t, x0))
                    v = self.network(x_t, t, some["text"], some["mask"])
                    errors.append(np.array(per_sample(v - (eps - x0))))
                    progress(1 / LEVELS)
        return float(np.mean(np.concatenate(errors).astype(np.float64)))

    def draw(
        self,
        prompt: Prompt,
        *,
        seed: int,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> mx.array:
        """Latents (1, h, w, C) of a prompt, in the first size of the data.

        Args:
            steps: of the model's sampler; fewer give the estimate after them. None: all.
            progress: see `last_step`.
        """
        drawn = denoise_public(
            self.teacher, self.data.condition(prompt), seeds=[seed], settings=self.settings
        )
        return last_step(itertools.islice(drawn, steps), progress).x0


def estimate_public(validation: PublicValidation, *, memory: int, accumulate: int) -> Estimate:
    """Measure a step and a step of a picture, without changing the model.

    Args:
        memory: from `training_memory`; the measured peak counts if it is larger.
        accumulate: batches in a step.
    """
    network, data = validation.network, validation.data
    mx.reset_peak_memory()
    started = time.perf_counter()
    mx.eval(PublicFineTuning().gradients(network, data(0), mx.random.key(0), None))
    step = time.perf_counter() - started
    memory = max(memory, mx.get_peak_memory() + BASE_BYTES)
    started = time.perf_counter()
    validation.draw(data.empty, seed=0, steps=1)
    picture = (time.perf_counter() - started) * (validation.settings.num_inference_steps or 0)
    mx.clear_cache()
    return Estimate(accumulate * step, picture, memory)
