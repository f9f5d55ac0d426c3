"""A checkpoint of this project as a teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.formats import is_teacher
from mlx_snapgen.lora.adapters import active_adapters
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.sampling import guide
from mlx_snapgen.teachers.base import Condition, Teacher
from mlx_snapgen.teachers.folder import load_flow_teacher


class CheckpointTeacher:
    """The full width of an `EfficientDiT`, with all adapters off except the few-step one.

    Args:
        network: may be the network whose adapters are trained: adapters that are off have no
            effect, so teacher, student and critic can share one set of base weights.
        text_encoders: the model's.
        few_step: name of the few-step adapter in `network`, or None when there is none.
        unconditional: `ModelConfig.unconditional_prompt`.
    """

    def __init__(
        self,
        network: EfficientDiT,
        text_encoders: Sequence[Any],
        *,
        few_step: str | None = None,
        unconditional: Prompt = "",
    ):
        self.unconditional = unconditional
        self.network, self.text_encoders, self.few_step = network, text_encoders, few_step

    @property
    def feature_dims(self) -> int:
        """See `Teacher.feature_dims`."""
        return self.network.config.hidden_size

    @property
    def has_few_step(self) -> bool:
        """See `Teacher.has_few_step`."""
        return self.few_step is not None

    def encode(self, prompts: Sequence[str]) -> Condition:
        """See `Teacher.encode`."""
        return Condition(*self.read(prompts), *self.read([self.unconditional]))

    def read(self, prompts: Sequence[Prompt]) -> tuple[mx.array, mx.array]:
        """Prompts -> the network's joined text (B, L, D) and mask (B, L)."""
        with active_adapters(self.network):
            return encode_prompts(prompts, self.text_encoders, transformer=self.network)

    def velocity(
        self, x_t: mx.array, t: mx.array, condition: Condition, *, guidance_scale: float = 1.0
    ) -> mx.array:
        """See `Teacher.velocity`."""
        return self.velocity_and_features(x_t, t, condition, guidance_scale=guidance_scale)[0]

    def velocity_and_features(
        self,
        x_t: mx.array,
        t: mx.array,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        few_step: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """See `Teacher.velocity_and_features`; with guidance one pass of a double batch."""
        text, mask = condition.text, condition.mask
        guided = guidance_scale != 1
        if guided:
            count = len(x_t)
            text = mx.concatenate([mx.repeat(condition.empty_text, count, 0), text])
            mask = mx.concatenate([mx.repeat(condition.empty_mask, count, 0), mask])
            x_t, t = mx.concatenate([x_t, x_t]), mx.concatenate([t, t])
        names = [self.few_step] if few_step and self.few_step is not None else []
        with active_adapters(self.network, *names):
            v, features = self.network(x_t, t, text, mask, return_features=True)
        if not guided:
            return v, features
        v_uncond, v_cond = mx.split(v, 2)
        return guide(v_cond, v_uncond, guidance_scale), mx.split(features, 2)[1]


def load_teacher(folder: Path) -> tuple[Teacher, Autoencoder]:
    """A teacher and its autoencoder.

    `folder` is a model of this project, or a public one that `convert.teacher` wrote.
    """
    if is_teacher(folder):
        return load_flow_teacher(folder)
    components = load_pretrained(folder)
    teacher = CheckpointTeacher(
        components.transformer,
        components.text_encoders,
        unconditional=components.config.unconditional_prompt,
    )
    return teacher, components.autoencoder
