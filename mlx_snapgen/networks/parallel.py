"""Independent parts of a network on all cores of a CPU.

A stream of MLX has one CPU thread, so that only the products of BLAS use more cores. Inside
`on_all_cores`, BLAS has one thread instead, and the parts of large operations are on as many
streams as it had threads. Elsewhere, on a GPU, and without OpenBLAS or with its OpenMP build,
everything is one part.

What the parts are depends on the shapes of one picture, and not on its batch, so that a picture is
computed in the same parts alone and in a batch. A batch of small pictures, which have one part
each, is computed in groups instead (`products.by_pictures`), and decoded by `each_on_a_core`.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

from mlx_snapgen._blas import blas_threads, one_blas_thread

P = ParamSpec("P")
T = TypeVar("T")
MOST_STREAMS = 8
"""With more cores, BLAS has its threads. Measured with two."""
MANY_TOKENS = 1024
"""Tokens of a picture from which on parts are faster than BLAS's threads. A step of `small` takes
0.82 of the time at 1024 tokens, and 1.05 at 256."""
LEAST_WORK = 1 << 22
"""Multiplications of a part at least: fewer take less time than another stream needs to start."""
LEAST_TOKENS = 256
"""Tokens of a part at least: products with fewer are slower."""

_PARTS = ContextVar("parts", default=1)
_GROUPS = ContextVar("groups", default=1)


def on_all_cores(function: Callable[P, T], *, tokens: int, pictures: int = 1) -> Callable[P, T]:
    """`function`, which returns arrays, with the parts of its operations at once.

    If it has parts or groups, its result is evaluated.

    Args:
        tokens: of one picture; with less than `MANY_TOKENS`, everything is one part, and groups of
            the `pictures` of a batch are computed at once.
    """
    parts = _PARTS if tokens >= MANY_TOKENS else _GROUPS

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        count = streams()
        if count == 1 or (parts is _GROUPS and pictures == 1):
            return function(*args, **kwargs)
        with _set(parts, count), one_blas_thread():
            result = function(*args, **kwargs)
            mx.eval(result)
        return result

    return call


def streams() -> int:
    """The number of streams to use: 1 on a GPU or where they would not help."""
    count = blas_threads() if mx.default_device().type == mx.DeviceType.cpu else 1
    return 1 if count > MOST_STREAMS else count


def each_on_a_core(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of `streams()` independent calls at most, such as decodings, computed at once.

    If there are several, they are evaluated. Two decodings at 256 x 256 take 0.55 (convolutional)
    to 0.8 (DC-AE) of the time that they take one after another, each with two threads of BLAS.
    """
    if len(calls) == 1:
        return [calls[0]()]
    with _set(_PARTS, len(calls)), one_blas_thread():
        results = at_once(calls)
        mx.eval(results)
    return results


def group_count() -> int:
    """The number of groups of pictures that are computed at once; 1 inside of a group."""
    return _GROUPS.get()


def part_count(work: int) -> int:
    """The number of parts of so many multiplications; 1 inside of a part."""
    return max(1, min(_PARTS.get(), work // LEAST_WORK))


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of independent `calls`, which have no parts themselves.

    They have few operations, as a block or a decoder: MLX starts operations in an order of its own,
    about 100 ahead, so that whole transformers run one after another even so.
    """
    count = max(_PARTS.get(), _GROUPS.get())
    if count == 1 or len(calls) == 1:
        return [call() for call in calls]
    used = [mx.default_stream(mx.default_device()), *_more_streams(count - 1)]
    results = []
    with _set(_PARTS, 1), _set(_GROUPS, 1):
        for call, stream in zip(calls, itertools.cycle(used)):
            with mx.stream(stream):
                results.append(call())
    return results


def cut(length: int, count: int) -> list[slice]:
    """`count` slices of about the same size."""
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def by_tokens(function: Callable[[mx.array], Any], x: mx.array) -> Any:
    """function(x), which computes each token by itself, for parts of the tokens at once.

    The tokens are in the second-last axis of x and of the result, or of its arrays.
    """
    tokens, count = x.shape[-2], _PARTS.get()
    if count == 1 or tokens < count * LEAST_TOKENS:
        return function(x)
    parts = [functools.partial(function, x[..., here, :]) for here in cut(tokens, count)]
    results = at_once(parts)
    if isinstance(results[0], mx.array):
        return mx.concatenate(results, axis=-2)
    return tuple(mx.concatenate(list(arrays), axis=-2) for arrays in zip(*results, strict=True))


@functools.cache
def _more_streams(count: int) -> list[Any]:
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(count)]


@contextlib.contextmanager
def _set(variable: ContextVar[int], count: int) -> Iterator[None]:
    token = variable.set(count)
    try:
        yield
    finally:
        variable.reset(token)
