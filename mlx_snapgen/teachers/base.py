"""The interface of a teacher in distillation.

A teacher is a flow model with guidance, last-layer features, and a few-step mode: a LoRA over the
same weights, or other weights of the same network.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx


class Condition(NamedTuple):
    """Encoded prompts: text (B, L, D), mask (B, L), and both of the unconditional text (1, ...)."""

    text: mx.array
    mask: mx.array
    empty_text: mx.array
    empty_mask: mx.array


class Teacher(Protocol):
    """A frozen flow model. x_t is (B, H, W, C), t is (B,), velocities are shaped like x_t."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts with this teacher's text encoders."""
        ...

    def velocity(
        self, x_t: mx.array, t: mx.array, condition: Condition, *, guidance_scale: float = 1.0
    ) -> mx.array:
        """The many-step model's velocity (xi); a scale of 1 disables guidance."""
        ...

    def velocity_and_features(
        self,
        x_t: mx.array,
        t: mx.array,
        condition: Condition,
        *,
        guidance_scale: float = 1.0,
        few_step: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Velocity as in `velocity`, and last-layer features (B, N, D) of the prompts' pass.

        The network runs with the prompts once for both. With `few_step` they are those of the
        few-step mode (xi').
        """
        ...

    @property
    def feature_dims(self) -> int:
        """D of the features."""
        ...

    @property
    def has_few_step(self) -> bool:
        """Whether there is a few-step mode."""
        ...
