"""Where the time of a denoising step goes: `python -m mlx_snapgen.benchmark --profile`.

MLX is lazy, and its own counters depend on the backend. Here each operation of a kind, such as a
norm, is computed alone, on the values and in the shapes of a real step: its inputs are evaluated
before its time starts and its output before it ends. So the table means the same on every backend.
What is between these operations is one more kind. On a CPU, operations have no parts that run at
once (`networks.parallel`), and products have BLAS's threads. On a GPU the sum is longer than a
step, because the device waits for each operation; the shares still rank the kinds.
"""

import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_snapgen.networks import attention, efficient_dit
from mlx_snapgen.networks.elastic import ElasticLinear, QuantizedElasticLinear

KINDS: dict[str, tuple[tuple[Any, str], ...]] = {
    "products": (
        (ElasticLinear, "__call__"),
        (QuantizedElasticLinear, "__call__"),
        (nn.Linear, "__call__"),
    ),
    "attention to all": ((attention, "attend_all"),),
    "attention in bands": ((attention, "neighborhood_attention"),),
    "norms": ((efficient_dit, "layer_norm"), (nn.LayerNorm, "__call__"), (nn.RMSNorm, "__call__")),
    "activations": ((efficient_dit, "gelu"), (efficient_dit, "silu")),
    "modulation": ((efficient_dit, "modulate"),),
    "RoPE": ((attention, "apply_rope"),),
    "reshapes": (
        (attention, "split_heads"),
        (attention, "merge_heads"),
        (efficient_dit, "space_to_depth"),
        (efficient_dit, "depth_to_space"),
    ),
}
"""Kind -> the functions and methods of the Efficient DiT that compute it, where it calls them.
"attention to all" is the global branch, that of the Middle stage and that to the text."""

OTHERS = "others"
"""Residuals, gates, the mix of the branches, long skips, and all that is between the operations."""


@dataclass
class Part:
    """Operations of one kind in a step."""

    seconds: float = 0.0
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Shape of the output -> number of operations."""

    @property
    def calls(self) -> int:
        """Number of operations."""
        return self.shapes.total()


def profile(
    step: Callable[[], Any], *, repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Part]:
    """Seconds of each kind of operation in one call of `step`, by `KINDS`, then `OTHERS`.

    Args:
        step: computes a step of an `EfficientDiT`.
        repeats: calls after a warm-up; the seconds are medians.
        clock: such as `time.process_time`, which counts the seconds of all threads.
    """
    mx.eval(step())
    found = [_parts(step, clock) for _ in range(repeats)]
    medians = {k: statistics.median(parts[k].seconds for parts in found) for k in found[0]}
    return {kind: Part(medians[kind], part.shapes) for kind, part in found[0].items()}


def _parts(step: Callable[[], Any], clock: Callable[[], float]) -> dict[str, Part]:
    parts = {kind: Part() for kind in KINDS}
    with _timed(parts, clock):
        start = clock()
        mx.eval(step())
        whole = clock() - start
    return parts | {OTHERS: Part(whole - sum(part.seconds for part in parts.values()))}


@contextmanager
def _timed(parts: dict[str, Part], clock: Callable[[], float]) -> Iterator[None]:
    """Inside, each operation waits for its inputs and adds its time to its part."""
    inside = False

    def timed(function: Callable[..., Any], part: Part) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # of an operation that is timed
                return function(*args, **kwargs)
            mx.eval([x for _, x in tree_flatten([args, kwargs]) if isinstance(x, mx.array)])
            inside, start = True, clock()
            out = function(*args, **kwargs)
            mx.eval(out)
            part.seconds += clock() - start
            part.shapes[tuple(out.shape)] += 1
            inside = False
            return out

        return call

    places = [(*place, parts[kind]) for kind, some in KINDS.items() for place in some]
    with _replaced(places, timed):
        yield


@contextmanager
def _replaced(
    places: Sequence[tuple[Any, str, Any]], wrap: Callable[[Callable[..., Any], Any], Any]
) -> Iterator[None]:
    """Inside, each function (owner, name, argument) is `wrap(function, argument)`."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in places]
    try:
        for (owner, name, function), (_, _, argument) in zip(before, places, strict=True):
            setattr(owner, name, wrap(function, argument))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def count_flops(step: Callable[[], Any]) -> dict[str, float]:
    """Floating-point operations of the products in a step, by kind; nothing is computed.

    A product of n x k and k x m numbers has 2 n k m.
    """
    flops = {"linear layers": 0.0, "attention": 0.0}

    def linear(out: mx.array, _layer: Any, x: mx.array, *_args: Any, **_how: Any) -> None:
        flops["linear layers"] += 2 * out.size * x.shape[-1]

    def attention_to(out: mx.array, _q: mx.array, k: mx.array, *_args: Any, **_how: Any) -> None:
        flops["attention"] += 4 * out.size * k.shape[2]

    def counted(function: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            count(out, *args, **kwargs)
            return out

        return call

    places = [(*place, linear) for place in KINDS["products"]]
    with _replaced([*places, (attention, "attend", attention_to)], counted):
        step()
    return flops


def table(parts: dict[str, Part]) -> str:
    """The parts as aligned text."""
    whole = sum(part.seconds for part in parts.values())
    lines = [f"{'operations':<20}{'calls':>7}{'seconds':>10}{'share':>8}"]
    for kind, part in parts.items():
        calls = part.calls if kind != OTHERS else ""
        lines.append(f"{kind:<20}{calls:>7}{part.seconds:>10.4f}{part.seconds / whole:>8.1%}")
    lines.append(f"{'sum':<20}{'':>7}{whole:>10.4f}{1:>8.1%}")
    return "\n".join(lines)


def times_its_products(step: float, parts: dict[str, Part], flops: dict[str, float]) -> float:
    """Seconds of a whole step in those of its products; not on a GPU, where parts wait for it.

    The products of attention count at the linear layers' speed.

    Args:
        step: seconds of the step, without waiting for each operation.
        flops: of `count_flops`.
    """
    linear = parts["products"].seconds
    return step / (linear * (1 + flops["attention"] / flops["linear layers"]))
