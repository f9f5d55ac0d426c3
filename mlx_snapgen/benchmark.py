"""Step latency and peak memory: `python -m mlx_snapgen.benchmark`.

Random weights at paper scale. Every figure is a median; compare the ratios, which one noisy machine
still gets right. `blocks` sets one block of dense attention against one of ASSA, `ladder` walks the
paper's ablation A -> D, `widths` runs the three sizes.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

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


def time_calls(run: Callable[[], mx.array], repeats: int) -> dict[str, float]:
    """Seconds of `run` (median, least, most) and peak memory in bytes, after a warm-up."""
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
    config: TransformerConfig, height: int, width: int, dtype: mx.Dtype, repeats: int
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
    config: TransformerConfig, sparse: bool, height: int, width: int, dtype: mx.Dtype, repeats: int
) -> dict[str, float]:
    """Self-attention of one Down-stage block."""
    module = (SparseSelfAttention if sparse else SelfAttention)(config)
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    grid = Grid(height // 8 // config.patch_size, width // 8 // config.patch_size)
    h = mx.random.normal((1, grid.height * grid.width, config.hidden_size)).astype(dtype)
    from mlx.utils import tree_flatten

    parameters = sum(p.size for _, p in tree_flatten(module.parameters()))
    return {"parameters": parameters, **time_calls(lambda: module(h, grid), repeats)}


def measure(
    name: str, height: int, width: int, dtype: mx.Dtype, repeats: int, base: TransformerConfig
) -> dict[str, float]:
    """Measure one preset, or one block of `base` by the names in `SUITES`."""
    gc.collect()
    mx.clear_cache()
    if name in SUITES["blocks"]:
        return measure_block(base, name == "assa-block", height, width, dtype, repeats)
    config = dataclasses.replace(TRANSFORMERS[name], widths=(1.0,))
    return measure_step(config, height, width, dtype, repeats)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_snapgen.benchmark",
        description="Step latency and peak memory with random weights. Trust the ratios.",
        epilog="example: python -m mlx_snapgen.benchmark --suite ladder --size 512 --json",
    )
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--preset", action="append", help="measure this preset only (repeatable)")
    parser.add_argument("--size", type=int, default=1024, help="picture height and width in pixels")
    parser.add_argument("--height", type=int, help="picture height in pixels (default: --size)")
    parser.add_argument("--width", type=int, help="picture width in pixels (default: --size)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls per preset")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on the CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args()

    height = args.size if args.height is None else args.height
    width = args.size if args.width is None else args.width
    for side in (height, width):
        if side < 32 or side % 32:
            raise UserError(f"picture sides must be multiples of 32 pixels, got {side}")
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {args.repeats}")
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    if args.preset:
        names = [name for name in args.preset if name in SUITES["blocks"]]
        names += [n for n in args.preset if n not in names and transformer_preset(n)]
    elif args.suite == "all":
        names = [name for suite in SUITES.values() for name in suite]
    else:
        names = list(SUITES[args.suite])
    results = {}
    for i, name in enumerate(names):
        print(f"[{i + 1}/{len(names)}] {name} ...", end=" ", file=sys.stderr, flush=True)
        results[name] = measure(
            name, height, width, getattr(mx, dtype), args.repeats, TRANSFORMERS["small"]
        )
        print(f"{results[name]['seconds']:.3f} s", file=sys.stderr, flush=True)
    setting = {"height": height, "width": width, "dtype": dtype, "device": str(mx.default_device())}
    if args.json:
        print(json.dumps(setting | {"presets": results}, indent=1))
    else:
        print(f"{height}x{width} px, {dtype}, {setting['device']}\n{table(results)}")


def command() -> None:
    """The console script `mlx-snapgen-benchmark`."""
    run_command(main)


if __name__ == "__main__":
    command()
