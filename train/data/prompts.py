"""Lists of prompts."""

from collections.abc import Sequence


def spread(items: Sequence[str], count: int) -> list[str]:
    """Up to `count` different items from all over a sequence."""
    different = list(dict.fromkeys(items))
    count = min(count, len(different))
    return [different[k * len(different) // count] for k in range(count)]
