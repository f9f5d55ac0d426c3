"""Public flow models as teachers."""

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.model import FEW_STEP
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import get_lora_weights, lora_weights
from mlx_snapgen.networks.layers import space_to_depth
from mlx_snapgen.networks.text_encoders.base import Prompt, PublicTextEncoder
from mlx_snapgen.sampling import get_schedule, guide
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.config import Schedule, TeacherConfig


class FlowTeacher:
    """A public network as a teacher.

    Args:
        config: of the teacher. If it has a few-step mode, but `network` has no adapter and there is
            no `few_step_network`, the model itself is distilled.
        network: a `VelocityNetwork`; its adapter `FEW_STEP`, if any, is the few-step mode.
        prompts: its text encoder; None once it was freed.
        few_step_network: the same network with the weights of the few-step mode.
    """

    def __init__(
        self,
        config: TeacherConfig,
        network: nn.Module,
        *,
        prompts: PublicTextEncoder | None,
        few_step_network: nn.Module | None = None,
    ):
        self.config, self.prompts = config, prompts
        self.network: Any = network
        self.few_step_network: Any = few_step_network
        self._away: dict[Prompt, tuple[mx.array, mx.array]] = {}

    @property
    def feature_dims(self) -> int:
        """See `Teacher.feature_dims`."""
        return self.config.transformer.hidden_size

    @property
    def has_few_step(self) -> bool:
        """See `Teacher.has_few_step`."""
        return self.config.few_step is not None

    @property
    def can_edit(self) -> bool:
        """Whether the teacher takes pictures to edit."""
        return self.config.abilities().edit

    def encode(self, prompts: Sequence[str], negative_prompt: str = "") -> Condition:
        """See `Teacher.encode`, and `PromptFormat.unconditional` of the negative prompt."""
        if self.prompts is None:
            raise UserError("this teacher's text encoder was freed: load the teacher again")
        away = self.prompts.prompt_format.unconditional(negative_prompt)
        if away not in self._away:
            self._away = {away: self.prompts([away])}
        return Condition(*self.prompts(prompts), *self._away[away])

    def free_text_encoder(self) -> None:
        """Free the memory of the text encoder; `encode` fails after that."""
        self.prompts = None
        mx.clear_cache()

    def free_networks(self) -> None:
        """Free the memory of the transformer; only `encode` works after that."""
        self.network = self.few_step_network = None
        mx.clear_cache()

    def velocity(
        self,
        x_t: mx.array,
        t: mx.array,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        references: Sequence[mx.array] = (),
    ) -> mx.array:
        """See `Teacher.velocity`; guidance is true CFG, two passes of the network.

        For Qwen-Image the velocity of each patch is then rescaled to its norm without guidance (as
        in diffusers' QwenImagePipeline).

        Args:
            references: latents of pictures to edit (see `Flux2Transformer.__call__`), for a teacher
                that `can_edit`.
        """
        v, _ = self.velocity_and_features(
            x_t, t, condition, guidance_scale=guidance_scale, references=references
        )
        return v

    def velocity_and_features(
        self,
        x_t: mx.array,
        t: mx.array,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        few_step: bool = False,
        references: Sequence[mx.array] = (),
    ) -> tuple[mx.array, mx.array]:
        """See `Teacher.velocity_and_features` and `velocity`.

        Raises:
            UserError: `few_step` without a few-step mode.
        """
        if few_step and not self.has_few_step:
            raise UserError(
                "this teacher has no few-step mode: convert it with --few-step-lora or "
                "--few-step-model, or do not use that mode"
            )
        run = functools.partial(self._run, x_t, t, few_step=few_step, references=references)
        v, features = run(condition.text, condition.mask, return_features=True)
        if guidance_scale == 1:
            return v, features
        empty = (mx.repeat(y, len(x_t), 0) for y in (condition.empty_text, condition.empty_mask))
        guided = guide(v, run(*empty), guidance_scale)
        if self.config.kind == "qwen-image":
            guided = guided * length_ratio(v, guided, patch=self.config.transformer.patch_size)
        return guided, features

    def _run(
        self,
        *arrays: mx.array,
        references: Sequence[mx.array],
        few_step: bool = False,
        **settings: Any,
    ):
        if references:
            settings["references"] = references
        if few_step and self.few_step_network is not None:
            return self.few_step_network(*arrays, **settings)
        known = FEW_STEP in get_lora_weights(self.network)
        weights = {FEW_STEP: float(few_step)} if known else {}
        with lora_weights(self.network, weights):
            return self.network(*arrays, **settings)


def length_ratio(v: mx.array, guided: mx.array, *, patch: int) -> mx.array:
    """|v| / |guided| of each patch of `patch` x `patch` latents, in the shape of v's latents.

    (B, H, W, C) both -> (B, H, W, 1).
    """
    lengths = [
        mx.linalg.norm(space_to_depth(y.astype(mx.float32), patch), axis=-1, keepdims=True)
        for y in (v, guided)
    ]
    ratio = lengths[0] / mx.maximum(lengths[1], 1e-12)
    return mx.repeat(mx.repeat(ratio, patch, 1), patch, 2).astype(v.dtype)


def shifted_levels(schedule: Schedule, count: int, *, time_shift: float) -> list[float]:
    """`count` + 1 levels from 1 down to 0, with a given shift."""
    *levels, end = get_schedule(count, time_shift)
    if schedule.terminal and levels[-1] < 1:
        stretch = (1 - schedule.terminal) / (1 - levels[-1])
        levels = [1 - (1 - level) * stretch for level in levels]
    return [*levels, end]
