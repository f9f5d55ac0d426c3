"""Lists of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_snapgen.errors import UserError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one in each line; empty lines are ignored.

    Raises:
        UserError: the file cannot be read, or has no prompt.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{path} is empty: one prompt in each line is expected")
    return prompts


@dataclass(frozen=True)
class PromptList:
    """A `PromptSource` that repeats a list."""

    items: Sequence[str]

    def prompts(self, number: int, count: int) -> list[str]:
        """Items number * count and those that follow it."""
        start = number * count
        return [self.items[k % len(self.items)] for k in range(start, start + count)]


def spread(items: Sequence[str], count: int) -> list[str]:
    """Up to `count` different items from all over a sequence."""
    different = list(dict.fromkeys(items))
    count = min(count, len(different))
    return [different[k * len(different) // count] for k in range(count)]
