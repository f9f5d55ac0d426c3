"""Lists of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.data.order import BatchOrder


@dataclass(frozen=True)
class PromptList:
    """A `PromptSource` that repeats a list, each time in another random order."""

    items: Sequence[str]
    seed: int = 0

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        order = BatchOrder([len(self.items)], batch_size=count, seed=self.seed)
        return [self.items[int(k)] for k in order(number)[1]]


def spread(items: Sequence[str], count: int) -> list[str]:
    """Up to `count` different items of a sequence, evenly spaced."""
    different = list(dict.fromkeys(items))
    count = min(count, len(different))
    return [different[k * len(different) // count] for k in range(count)]
