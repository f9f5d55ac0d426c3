"""Where training data come from.

What a source returns depends on the arguments and the source's own seed alone: a resumed run sees
the same data as one that was never stopped.
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np

Batch = dict[str, mx.array]


class PictureSource(Protocol):
    """Pictures with captions."""

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """Batch `number` of `count` samples: pictures of one size and their captions.

        Returns:
            pictures: uint8 (count, H, W, 3), RGB.
            captions: list of `count` strings.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """What the run's folder records of the source, as JSON values; "data" is its kind."""
        ...


class PromptSource(Protocol):
    """Prompts without pictures."""

    def prompts(self, number: int, count: int) -> list[str]:
        """Batch `number` of `count` prompts."""
        ...
