"""Lists of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptList:
    """A `PromptSource` that repeats a list."""

    items: Sequence[str]

    def prompts(self, number: int, count: int) -> list[str]:
        """Items number * count and those that follow it."""
        start = number * count
        return [self.items[k % len(self.items)] for k in range(start, start + count)]


def spread(items: Sequence[str], count: int) -> list[str]:
    """Up to `count` different items of a sequence, evenly spaced."""
    different = list(dict.fromkeys(items))
    count = min(count, len(different))
    return [different[k * len(different) // count] for k in range(count)]
