"""Models to measure behind one interface: those of this project, and public ones."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_pictures, to_pictures
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.sampling import Progress
from mlx_snapgen.settings import DrawSettings
from mlx_snapgen.teachers.draw import draw_public
from mlx_snapgen.teachers.flow import FlowTeacher
from train.data.source import Samples
from train.evaluation.validation import flow_losses, teacher_losses


class MeasuredModel(Protocol):
    """A model to measure."""

    @property
    def config(self) -> Any:
        """A `Description`."""
        ...

    @property
    def autoencoder(self) -> Autoencoder: ...

    def losses(
        self, batches: Iterable[Samples], shares: Sequence[float], *, progress: Progress
    ) -> dict[float, list[float]]:
        """See `flow_losses`."""
        ...

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        settings: DrawSettings,
        share: float,
        batch_size: int,
        progress: Progress,
    ) -> np.ndarray:
        """See `draw_pictures`."""
        ...


class OwnModel:
    """A model of this project, at any of its widths."""

    def __init__(self, components: Components):
        self.components = components
        self.config, self.autoencoder = components.config, components.autoencoder

    def losses(
        self, batches: Iterable[Samples], shares: Sequence[float], *, progress: Progress
    ) -> dict[float, list[float]]:
        # The few-step LoRA, if the model has one, is off: the loss is that of the velocity.
        transformer, encoders = self.components.transformer, self.components.text_encoders
        return flow_losses(transformer, encoders, batches=batches, shares=shares, progress=progress)

    def draw(self, prompts: Sequence[str], **settings: Any) -> np.ndarray:
        return draw_pictures(self.components, prompts, **settings)


class PublicModel:
    """A public model; text encoder and transformer are both in memory."""

    def __init__(self, teacher: FlowTeacher, autoencoder: Autoencoder):
        self.teacher, self.config, self.autoencoder = teacher, teacher.config, autoencoder

    def losses(
        self, batches: Iterable[Samples], shares: Sequence[float], *, progress: Progress
    ) -> dict[float, list[float]]:
        found = teacher_losses(self.teacher, batches, progress)
        return {share: found for share in shares}

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        settings: DrawSettings,
        share: float,
        batch_size: int,
        progress: Progress,
    ) -> np.ndarray:
        settings, pictures = settings.resolved(self.config), []
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            latents = draw_public(
                self.teacher,
                prompts[chunk],
                seeds=seeds[chunk],
                settings=settings,
                progress=progress,
            )
            pictures += to_pictures(self.autoencoder, latents, progress)
        return np.concatenate(pictures)
