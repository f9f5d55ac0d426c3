"""Interfaces of sources of training data. Each source is a module in this folder.

The data depend only on the arguments and the source's seed, so that a resumed run gets the same
data as an uninterrupted one. To add a source, write a class with these methods (`imagefolder` is an
example), and choose it in a command at the top of `train/`.
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
        """Settings to record in the run's folder, as JSON values; "data" is the source's kind."""
        ...


class PromptSource(Protocol):
    """Prompts without pictures."""

    def prompts(self, number: int, count: int) -> list[str]:
        """Batch `number` of `count` prompts."""
        ...
