"""The interface of all transformers."""

from typing import Any, Protocol

import mlx.core as mx

LEAST_T = 0.05
"""A velocity is the distance to the predicted clean latents divided by t, or by this if t is less
(JiT, arXiv 2511.13720)."""


class VelocityNetwork(Protocol):
    """Velocity v = eps - x0 of latents x_t = (1 - t) x0 + t eps."""

    def __call__(
        self,
        x_t: mx.array,
        t: mx.array,
        text: mx.array,
        mask: mx.array | None = None,
        *,
        return_features: bool = False,
    ) -> Any:
        """Predict the velocity.

        Args:
            x_t: noisy normalized latents (B, H, W, C); H and W divide by the patch size. Any
                floating type: the network computes in that of its weights.
            t: noise level (B,) in [0, 1].
            text: states of the text (B, L, D).
            mask: (B, L), true where a text token counts; None when all do. Padding changes nothing.
            return_features: also return the picture's tokens after the last block (B, N, d).

        Returns:
            v (B, H, W, C), and the features when requested, in the type of x_t.
        """
        ...

    def checkpoint_blocks(self, enabled: bool = True) -> None:
        """Store only the inputs of blocks; the backward pass recomputes each block.

        Many attention scores are recomputed once more, in parts (`attention.attend_in_parts`). The
        gradients do not change. Memory decreases; time increases by about one forward pass.
        """
        ...


def velocity_to(x0: mx.array, x_t: mx.array, t: mx.array) -> mx.array:
    """The velocity of x_t towards predicted clean latents x0 (B, H, W, C), in the type of x_t."""
    away = mx.maximum(t.astype(mx.float32), LEAST_T)[:, None, None, None]
    return ((x_t.astype(mx.float32) - x0.astype(mx.float32)) / away).astype(x_t.dtype)
