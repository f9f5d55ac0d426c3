"""Configs of teachers, as frozen dataclasses. Does not import mlx."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_snapgen.config import AutoencoderConfig, check_latents
from mlx_snapgen.description import Abilities, choose_mode
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.presets import QWEN_IMAGE_AUTOENCODER
from mlx_snapgen.public_config import (
    Flux2TransformerConfig,
    MiniT2ITransformerConfig,
    QwenTransformerConfig,
    ZImageTransformerConfig,
)


@dataclass(frozen=True)
class Schedule:
    """A teacher's sampler, with the noise levels of diffusers' FlowMatchEulerDiscreteScheduler.

    The time shift is e^mu. mu is linear in the number of picture tokens, and is `log_shifts` at
    `tokens`.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    log_shifts: tuple[float, float] = (0.5, 0.9)
    tokens: tuple[int, int] = (256, 8192)
    terminal: float = 0.0
    """The levels are stretched so that the last one before 0 has this value; 0 disables it."""
    is_empirical: bool = False
    """mu is FLUX.2's (`empirical_log_shift`) instead."""

    def __post_init__(self):
        if self.tokens[0] >= self.tokens[1] or max(map(abs, self.log_shifts)) > 10:
            raise UserError(
                f"a schedule takes two rising numbers of tokens, not {self.tokens}, and shifts of "
                f"at most e^10, not {self.log_shifts}"
            )
        if not 0 <= self.terminal < 1:
            raise UserError(f"the last noise level must be 0 to 1, not {self.terminal}")

    def time_shift(self, num_tokens: int, num_steps: int) -> float:
        """Shift of the noise levels for `num_steps` steps of a picture of `num_tokens` tokens."""
        if self.is_empirical:
            return math.exp(empirical_log_shift(num_tokens, num_steps))
        (low, high), (few, many) = self.log_shifts, self.tokens
        return math.exp(low + (high - low) * (num_tokens - few) / (many - few))


def empirical_log_shift(num_tokens: int, num_steps: int) -> float:
    """FLUX.2's mu: linear in the steps, between its values for 10 and for 200 steps.

    Both are linear in the tokens. Pictures of more than 4300 tokens have the value for 200 steps.
    """
    ten = 1.89833333 + 8.73809524e-05 * num_tokens
    two_hundred = 0.45666666 + 0.00016927 * num_tokens
    if num_tokens > 4300:
        return two_hundred
    return two_hundred + (ten - two_hundred) * (200 - num_steps) / 190


LIGHTNING = Schedule(4, guidance_scale=1.0, log_shifts=(math.log(3), math.log(3)))
"""The few-step schedule of Qwen-Image-Lightning's LoRAs."""

TURBO = Schedule(8, guidance_scale=1.0, log_shifts=(math.log(3), math.log(3)))
"""The few-step schedule of Z-Image-Turbo."""

Z_IMAGE = Schedule(50, guidance_scale=5.0, log_shifts=(math.log(6), math.log(6)))
"""The schedule of Z-Image, from which Turbo is distilled: shift 6 as in its scheduler_config.json.

Its model card's guidance scale of 4 is 5 here: its pipeline counts from 0.
"""

KLEIN_BASE = Schedule(50, guidance_scale=4.0, is_empirical=True)
"""The schedule of FLUX.2 klein base."""

KLEIN = Schedule(4, guidance_scale=1.0, is_empirical=True)
"""The few-step schedule of FLUX.2 klein."""

MINIT2I = Schedule(100, guidance_scale=2.5, log_shifts=(0.0, 0.0))
"""The schedule of MiniT2I-B/16: even steps, and the guidance scale that its authors recommend."""

MINIT2I_L = replace(MINIT2I, guidance_scale=6.0)
"""That of MiniT2I-L/16."""

TRANSFORMERS: dict[str, type] = {
    "qwen-image": QwenTransformerConfig,
    "z-image": ZImageTransformerConfig,
    "flux2": Flux2TransformerConfig,
    "minit2i": MiniT2ITransformerConfig,
}
"""`TeacherConfig.kind` -> config of its transformer."""


NAMES = {
    ("qwen-image", False): "Qwen-Image",
    ("qwen-image", True): "Qwen-Image, distilled",
    ("z-image", False): "Z-Image",
    ("z-image", True): "Z-Image-Turbo",
    ("flux2", False): "FLUX.2 klein base",
    ("flux2", True): "FLUX.2 klein",
    ("minit2i", False): "MiniT2I",
}
"""(`TeacherConfig.kind`, whether the model is distilled) -> its name."""


@dataclass(frozen=True)
class TeacherConfig:
    """A public flow model, to draw with or as a teacher: one `teacher.json`.

    It is a `description.Description`.
    """

    kind: str = "qwen-image"
    transformer: Any = field(default_factory=QwenTransformerConfig)
    autoencoder: AutoencoderConfig = QWEN_IMAGE_AUTOENCODER
    schedule: Schedule = field(default_factory=lambda: Schedule(terminal=0.02))
    few_step: Schedule | None = None
    """The schedule of the few-step mode: of the LoRA or the second network in the folder, or of the
    model itself if it is distilled. None if there is no such mode."""
    text_encoder: str = "text_encoder"
    """Folder (absolute, or relative to the teacher's folder) or Hugging Face repository with the
    language model and its tokenizer, in the format of Hugging Face or mlx-lm."""
    quantization: dict[str, int] | None = None
    """How the transformer's blocks are stored: `{"bits": 4, "group_size": 64}`."""

    def __post_init__(self):
        check_latents(self.transformer.latent_channels, self.autoencoder)

    @property
    def is_distilled(self) -> bool:
        """Whether the model itself is its few-step mode."""
        return self.few_step == self.schedule

    @property
    def name(self) -> str:
        """See `Description.name`."""
        return NAMES[self.kind, self.is_distilled]

    @property
    def image_size(self) -> tuple[int, int]:
        """See `Description.image_size`."""
        return self.trained_sizes[0] if self.trained_sizes else (1024, 1024)

    @property
    def trained_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Description.trained_sizes`; most public models draw many sizes."""
        side = getattr(self.transformer, "image_size", None)
        return () if side is None else ((side, side),)

    @property
    def size_unit(self) -> int:
        """See `Description.size_unit`."""
        return self.autoencoder.downsampling * self.transformer.patch_size

    @property
    def widths(self) -> tuple[float, ...]:
        """See `Description.widths`."""
        return (1.0,)

    def abilities(self, *, few_step: bool = False) -> Abilities:
        """See `Description.abilities`."""
        return Abilities(
            guidance=not (few_step or self.is_distilled),
            attention_modulation=False,
            part_of_text_encoders=False,
            edit=self.kind == "flux2",
            any_size=not self.trained_sizes,
            batches=False,
        )

    def sampler_for(
        self, num_inference_steps: int | None = None, few_step: bool | None = None
    ) -> Schedule:
        """See `Description.sampler_for`; a distilled model has one mode."""
        if self.is_distilled and self.few_step is not None:
            return self.few_step
        return choose_mode(
            self.schedule, self.few_step, num_inference_steps=num_inference_steps, few_step=few_step
        )

    def time_shift(
        self, height: int, width: int, *, few_step: bool = False, num_inference_steps: int = 0
    ) -> float:
        """See `Description.time_shift`."""
        schedule = self.few_step if few_step and self.few_step else self.schedule
        tokens = height // self.size_unit * (width // self.size_unit)
        steps = num_inference_steps or schedule.num_inference_steps
        return schedule.time_shift(tokens, steps)


def teacher_config(values: dict[str, Any]) -> TeacherConfig:
    """`TeacherConfig` from JSON values; `UserError`: an unknown kind or key."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in TRANSFORMERS:
        known = ", ".join(TRANSFORMERS)
        raise UserError(
            f"unknown teacher kind '{kind}'{nearest(str(kind), TRANSFORMERS)}, known: {known}"
        )
    transformer = from_dict(TRANSFORMERS[kind], values.get("transformer", {}))
    return from_dict(TeacherConfig, values | {"transformer": transformer})
