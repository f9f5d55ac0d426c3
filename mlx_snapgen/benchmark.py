"""Step latency and peak memory: `python -m mlx_snapgen.benchmark`.

Random weights at paper scale. Times are medians; compare their ratios, as absolute times depend on
the machine and its load. The suite `blocks` compares one block of dense attention with one of ASSA,
`ladder` is the paper's ablation A to D, `widths` the three network widths.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_snapgen.cli.options import Parser, integer
from mlx_snapgen.config import TRANSFORMERS, TransformerConfig, transformer_preset
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.attention import Grid, SelfAttention, SparseSelfAttention
from mlx_snapgen.networks.efficient_dit import EfficientDiT, count_parameters
from mlx_snapgen.networks.text_encoders.base import TextStates

PAPER_LADDER_MS = {"ladder-a": 2000, "ladder-b": 550, "ladder-c": 293, "ladder-d": 360}
"""One step at 1024 px on an iPhone 16 Pro Max, from the paper's ablation."""

SUITES = {
    "ladder": tuple(PAPER_LADDER_MS),
    "widths": ("full", "small", "tiny"),
    "blocks": ("dense-block", "assa-block"),
}


def time_calls(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of `run` (median, minimum, maximum), and peak memory in bytes, after a warm-up."""
    mx.eval(run())
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_bytes": mx.get_peak_memory(),
    }


def measure_step(
    config: TransformerConfig, *, height: int, width: int, dtype: mx.Dtype, repeats: int
) -> dict[str, float]:
    """One denoising step of a `height` x `width` pixel picture with 77 text tokens."""
    network = EfficientDiT(config)
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    x_t = mx.random.normal((1, height // 8, width // 8, config.latent_channels)).astype(dtype)
    states = [
        TextStates(mx.random.normal((1, 77, dims)).astype(dtype), mx.ones((1, 77), mx.bool_))
        for dims in config.text_dims
    ]
    text, mask = network.encode_text(states)
    t = mx.array([0.5])
    result = time_calls(lambda: network(x_t, t, text, mask), repeats)
    return {"parameters": count_parameters(config), **result}


def measure_block(
    config: TransformerConfig,
    sparse: bool,
    *,
    height: int,
    width: int,
    dtype: mx.Dtype,
    repeats: int,
) -> dict[str, float]:
    """Self-attention of one Down-stage block."""
    module = (SparseSelfAttention if sparse else SelfAttention)(config)
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    grid = Grid(height // 8 // config.patch_size, width // 8 // config.patch_size)
    h = mx.random.normal((1, grid.height * grid.width, config.hidden_size)).astype(dtype)
    weights: Any = tree_flatten(module.parameters())
    parameters = sum(p.size for _, p in weights)
    return {"parameters": parameters, **time_calls(lambda: module(h, grid), repeats)}


def measure(name: str, base: TransformerConfig, **how: Any) -> dict[str, float]:
    """Measure a preset, or a block of `base`; `name` is one of those in `SUITES`.

    `how` are the other arguments of `measure_step`.
    """
    gc.collect()
    mx.clear_cache()
    if name in SUITES["blocks"]:
        return measure_block(base, name == "assa-block", **how)
    return measure_step(dataclasses.replace(TRANSFORMERS[name], widths=(1.0,)), **how)


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as aligned text; speed-ups are against the first row of the suite."""
    lines = [f"{'preset':<14}{'params':>9}{'s/step':>10}{'speed-up':>10}{'peak GiB':>10}  paper ms"]
    for suite in SUITES.values():
        rows = [name for name in suite if name in results]
        for name in rows:
            r, first = results[name], results[rows[0]]
            paper = PAPER_LADDER_MS.get(name)
            lines.append(
                f"{name:<14}{r['parameters'] / 1e6:>8.1f}M{r['seconds']:>10.3f}"
                f"{first['seconds'] / r['seconds']:>9.2f}x{r['peak_bytes'] / 2**30:>10.2f}"
                + (f"  {paper} ({2000 / paper:.2f}x)" if paper else "")
            )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="python -m mlx_snapgen.benchmark",
        description="Measure seconds and peak memory of a denoising step with random weights.",
        epilog="example: python -m mlx_snapgen.benchmark --suite ladder --size 512 --json",
    )
    add = parser.add_argument
    add(
        "--suite",
        choices=[*SUITES, "all"],
        default="all",
        help="networks to measure (default: %(default)s)",
    )
    add(
        "--preset",
        action="append",
        metavar="NAME",
        help="measure this preset or block only; repeat for more (default: those of the suite)",
    )
    add(
        "--size",
        type=integer(32),
        default=1024,
        metavar="PX",
        help="picture height and width in pixels (default: %(default)s)",
    )
    for side in ("height", "width"):
        text = f"picture {side} in pixels (default: --size)"
        add(f"--{side}", type=integer(32), metavar="PX", help=text)
    add(
        "--repeats",
        type=integer(1),
        default=3,
        metavar="N",
        help="timed calls per preset (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="type of weights and activations (default: float32 on a CPU, bfloat16 on a GPU)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object instead of a table (default: off)",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    height = args.size if args.height is None else args.height
    width = args.size if args.width is None else args.width
    for side in (height, width):
        if side % 32:
            raise UserError(f"picture sides must be multiples of 32 pixels, got {side}")
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    if args.preset:
        names = [name for name in args.preset if name in SUITES["blocks"]]
        names += [n for n in args.preset if n not in names and transformer_preset(n)]
    elif args.suite == "all":
        names = [name for suite in SUITES.values() for name in suite]
    else:
        names = list(SUITES[args.suite])
    how = {"height": height, "width": width, "dtype": getattr(mx, dtype), "repeats": args.repeats}
    results = {}
    for i, name in enumerate(names):
        print(f"[{i + 1}/{len(names)}] {name} ...", end=" ", file=sys.stderr, flush=True)
        results[name] = measure(name, TRANSFORMERS["small"], **how)
        print(f"{results[name]['seconds']:.3f} s", file=sys.stderr, flush=True)
    setting = {
        "height": height,
        "width": width,
        "dtype": dtype,
        "device": mx.default_device().type.name,
    }
    if args.json:
        print(json.dumps(setting | {"presets": results}, indent=1))
    else:
        print(f"{height}x{width} px, {dtype}, {setting['device']}\n{table(results)}")


def command() -> None:
    """The console script `mlx-snapgen-benchmark`."""
    run_command(main)


if __name__ == "__main__":
    command()
