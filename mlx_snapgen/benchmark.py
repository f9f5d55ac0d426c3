"""Step latency and peak memory: `python -m mlx_snapgen.benchmark`.

Random weights at paper scale. Times are medians; compare their ratios, as absolute times depend on
the machine and its load. The suite `blocks` compares one block of dense attention with one of ASSA,
`ladder` is the paper's ablation A to D, `widths` the three network widths, and `peers` our network
beside PyTorch's: the same one, SANA and PixArt-Sigma. It needs torch and diffusers (pip install
"mlx_snapgen[parity]"), the folder convert/ of the repository, and 16 GB of memory in float32, as
the networks take turns; --preset chooses some of them.
"""

import argparse
import dataclasses
import gc
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_snapgen.cli.options import Parser, integer
from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.attention import Grid, SelfAttention, SparseSelfAttention
from mlx_snapgen.networks.efficient_dit import EfficientDiT, count_parameters
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.presets import TRANSFORMERS, preset_autoencoder, transformer_preset

PAPER_LADDER_MS = {"ladder-a": 2000, "ladder-b": 550, "ladder-c": 293, "ladder-d": 360}
"""One step at 1024 px on an iPhone 16 Pro Max, from the paper's ablation."""

SUITES = {
    "ladder": tuple(PAPER_LADDER_MS),
    "widths": ("full", "small", "tiny"),
    "blocks": ("dense-block", "assa-block"),
    "peers": (
        "small-f32",
        "small",
        "small-f32-pytorch",
        "small-pytorch",
        "sana-0.6b",
        "sana-1.6b",
        "pixart-sigma",
    ),
}
TEXT_TOKENS = 154
"""77 of each text encoder."""
PEERS_TEXT_TOKENS = 300
"""Those of SANA and PixArt-Sigma."""


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


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of each of `runs`, by name, as in `time_calls`; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in tqdm(range(1 + repeats), desc="rounds", leave=False, disable=None):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(s), "seconds_min": min(s), "seconds_max": max(s)}
        for name, s in seconds.items()
    }


def make_step(
    name: str, *, height: int, width: int, dtype: mx.Dtype, text_tokens: int
) -> tuple[int, Callable[[], mx.array]]:
    """Number of weights of a preset, and a function that computes a denoising step.

    Args:
        height, width: of the picture in pixels.
        text_tokens: of both text encoders together.
    """
    config = dataclasses.replace(TRANSFORMERS[name], widths=(1.0,))
    network = EfficientDiT(config)
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    side = preset_autoencoder(name).downsampling
    x_t = mx.random.normal((1, height // side, width // side, config.latent_channels)).astype(dtype)
    length = text_tokens // len(config.text_dims)
    states = [
        TextStates(mx.random.normal((1, length, n)).astype(dtype), mx.ones((1, length), mx.bool_))
        for n in config.text_dims
    ]
    text, mask = network.encode_text(states)
    t = mx.array([0.5])
    mx.eval(text, mask, x_t)
    return count_parameters(config), lambda: network(x_t, t, text, mask)


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

    `how` are the other arguments of `measure_block`.
    """
    gc.collect()
    mx.clear_cache()
    if name in SUITES["blocks"]:
        return measure_block(base, name == "assa-block", **how)
    repeats = how.pop("repeats")
    parameters, run = make_step(name, **how, text_tokens=TEXT_TOKENS)
    return {"parameters": parameters, **time_calls(run, repeats)}


def what_is_missing(name: str) -> str:
    """The packages that a network of the suite `peers` needs and that are not installed."""
    needed = [] if name in TRANSFORMERS else ["torch", "safetensors", "convert"]
    if needed and not name.endswith("-pytorch"):
        needed.append("diffusers")
    return ", ".join(package for package in needed if importlib.util.find_spec(package) is None)


def measure_peers(
    names: Sequence[str], *, height: int, width: int, dtype: mx.Dtype, repeats: int
) -> dict[str, dict[str, float]]:
    """Measure presets and networks of PyTorch, which are all in memory and take turns."""
    how: Any = {"height": height, "width": width, "text_tokens": PEERS_TEXT_TOKENS}
    made: dict[str, tuple[int, Callable[[], Any]]] = {}
    for name in names:
        if missing := what_is_missing(name):
            print(f"{name} is skipped: it needs {missing}", file=sys.stderr)
            continue
        print(f"making {name} ...", file=sys.stderr, flush=True)
        if name in TRANSFORMERS:
            count, step = make_step(name, dtype=dtype, **how)
            made[name] = count, lambda step=step: mx.eval(step())
        else:
            # This package does not import torch.
            peers = importlib.import_module("convert.peers")
            gpu = mx.default_device().type == mx.DeviceType.gpu
            kind = str(dtype).removeprefix("mlx.core.")
            made[name] = peers.make_peer(name, dtype=kind, gpu=gpu, **how)
    results = time_in_turn({name: run for name, (_, run) in made.items()}, repeats)
    return {name: {"parameters": made[name][0], **result} for name, result in results.items()}


def table(results: dict[str, dict[str, float]], suites: Iterable[Iterable[str]]) -> str:
    """The results as aligned text; speed-ups are against the first row of the suite."""
    lines = [f"{'preset':<18}{'params':>9}{'s/step':>10}{'speed-up':>10}{'peak GiB':>10}  paper ms"]
    for suite in suites:
        rows = [name for name in suite if name in results]
        for name in rows:
            r, first = results[name], results[rows[0]]
            paper = PAPER_LADDER_MS.get(name)
            lines.append(
                f"{name:<18}{r['parameters'] / 1e6:>8.1f}M{r['seconds']:>10.3f}"
                f"{first['seconds'] / r['seconds']:>9.2f}x"
                + (f"{r['peak_bytes'] / 2**30:>10.2f}" if "peak_bytes" in r else f"{'-':>10}")
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
        help="networks to measure (default: all, which is all but peers)",
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
    peers = args.suite == "peers"
    suites = [SUITES[args.suite]] if args.suite != "all" else list(SUITES.values())[:-1]
    if args.preset:
        suites = [args.preset]
    names = list(dict.fromkeys(name for suite in suites for name in suite))
    for name in names:
        if name not in SUITES["blocks"] and not (peers and name in SUITES["peers"]):
            transformer_preset(name)
        factor = preset_autoencoder(name.removesuffix("-pytorch")).downsampling
        unit = max(32, 2 * factor)
        for side in (height, width):
            if side % unit:
                raise UserError(f"{name}: picture sides must be multiples of {unit}, got {side}")
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    how = {"height": height, "width": width, "dtype": getattr(mx, dtype), "repeats": args.repeats}
    if peers:
        results = measure_peers(names, **how)
    else:
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
        print(f"{height}x{width} px, {dtype}, {setting['device']}\n{table(results, suites)}")


def command() -> None:
    """The console script `mlx-snapgen-benchmark`."""
    run_command(main)


if __name__ == "__main__":
    command()
