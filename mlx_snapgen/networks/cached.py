"""A cache of arrays that is bounded in bytes."""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

from mlx_snapgen.networks.layers import flat_parameters

P = ParamSpec("P")
R = TypeVar("R")


def bounded_cache(max_bytes: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`functools.lru_cache` for functions that return arrays, with a limit on their bytes.

    The latest results are kept, up to `max_bytes` in total. A result that is larger than that is
    computed at every call. Arguments must be hashable.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kept: OrderedDict[Hashable, tuple[R, int]] = OrderedDict()
        lock = threading.Lock()

        @functools.wraps(function)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            key = args, tuple(sorted(kwargs.items()))
            with lock:
                if key in kept:
                    kept.move_to_end(key)
                    return kept[key][0]
            result = function(*args, **kwargs)
            size = sum(array.nbytes for array in flat_parameters(result).values())
            with lock:
                if size <= max_bytes:
                    kept[key] = result, size
                while sum(size for _, size in kept.values()) > max_bytes:
                    kept.popitem(last=False)
            return result

        return cached

    return decorate
