"""Pictures during training: a sheet of fixed prompts after every checkpoint."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlx_snapgen.checkpoint.model import FEW_STEP, Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.pictures import contact_sheet
from mlx_snapgen.settings import parse_width
from train.loop.trainer import Trainer
from train.objectives.elastic import TextToLatents


class Previews:
    """`validate` of a `Trainer`: a sheet of prompts with averaged weights, one row per width.

    Args:
        components: the model; contains the modules that are trained.
        prompts: the prompts to draw.
        widths: names of the widths to draw with.
        adapter: see `mlx_snapgen.draw.draw_latents`.
        batch_size: pictures to draw at a time.
    """

    def __init__(
        self,
        components: Components,
        prompts: Sequence[str],
        *,
        widths: Sequence[str],
        adapter: str = FEW_STEP,
        batch_size: int = 16,
    ):
        self.batch_size = batch_size
        self.components, self.widths = components, list(widths)
        self.prompts, self.adapter = list(prompts), adapter

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        total = len(self.widths) * len(self.prompts)
        with trainer.averaged(), picture_bar(total, "sample pictures") as progress:
            rows = [
                draw_pictures(
                    self.components,
                    self.prompts,
                    seeds=range(len(self.prompts)),
                    share=parse_width(name).share,
                    adapter=self.adapter,
                    batch_size=self.batch_size,
                    progress=progress,
                )
                for name in self.widths
            ]
        labels = [f"{name}: {prompt}" for name in self.widths for prompt in self.prompts]
        sheet = contact_sheet(list(np.concatenate(rows)), labels, columns=len(self.prompts))
        with whole_file(trainer.sample_path("previews")) as partial:
            sheet.save(partial, "PNG")
        return {}


def previews_of(
    model: TextToLatents,
    autoencoder: Autoencoder,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    time_shift: float | None,
    widths: Sequence[str],
    batch_size: int = 16,
) -> Previews:
    """Previews of a supernetwork during training, with the time shift of its training.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    config = dataclasses.replace(
        model.config,
        image_size=size,
        autoencoder=autoencoder.config,
        sampler=dataclasses.replace(model.config.sampler, time_shift=time_shift),
        few_step=None,
    )
    components = Components(
        config=config,
        transformer=model.transformer,
        autoencoder=autoencoder,
        text_encoders=model.encoders,
    )
    return Previews(components, prompts, widths=widths, batch_size=batch_size)
