"""Step latency and peak memory: `python -m mlx_snapgen.benchmark`.

Random weights at paper scale. Times are medians; compare their ratios, as absolute times depend on
the machine and its load. The suite `blocks` compares one block of dense attention with one of ASSA,
`ladder` is the paper's ablation A to D, `widths` the three network widths, and `peers` our network
beside PyTorch's: the same one (PRESET-pytorch for each preset), SANA and PixArt-Sigma. It needs
torch and diffusers (pip install "mlx_snapgen[parity]") and the folder convert/ of the repository,
and 20 GB of memory in float32, as all are loaded and take turns; --preset chooses some of them.
`training` compares an elastic training step with its parts, and needs the folder train/; `memory`
is the peak of a step for each width, picture size and type of the weights, each in a process of its
own.

Where the time goes in one step: --profile. On a computer that is busy with other work, use
OPENBLAS_NUM_THREADS=1 and --cpu-seconds.
"""

import argparse
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

from mlx_snapgen import profile
from mlx_snapgen.cli.options import Parser, integer, option_of
from mlx_snapgen.errors import UserError, nearest, run_command
from mlx_snapgen.measure import (
    PUBLIC,
    TWIN,
    as_drawn,
    machine,
    make_block,
    make_step,
    measure_memory,
    measure_peers,
    time_calls,
)
from mlx_snapgen.presets import TRANSFORMERS, preset_autoencoder

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
        *PUBLIC,
    ),
}
UNUSED = {
    "training": ("preset", "size", "height", "width", "dtype", "profile"),
    "memory": ("height", "width", "dtype", "repeats", "cpu_seconds", "profile"),
}
"""Suites that are no list of networks -> the options that they do not use."""
MEMORY_SIZES = (256, 512, 1024)
"""Picture sides in pixels."""
MOST_PIXELS = 4096
"""Of a side: what is larger needs more memory than computers have."""


def measure_network(
    name: str, *, repeats: int, clock: Callable[[], float], **how: Any
) -> dict[str, float]:
    """Measure a preset or a block, one of those in `SUITES`; `how` is that of `make_step`."""
    gc.collect()
    mx.clear_cache()
    flops: dict[str, float] = {}
    if name in SUITES["blocks"]:
        parameters, run = make_block(TRANSFORMERS["small"], name == "assa-block", **how)
    else:
        parameters, run = make_step(name, **how)
        flops = {"flops": sum(profile.count_flops(run).values())}
        run = as_drawn(name, run, how["height"], how["width"])
    return {"parameters": parameters, **flops, **time_calls(run, repeats, clock=clock)}


def memory_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `measure_memory` as aligned text; a dash: not measured."""
    lines = [
        f"{'preset':<14}{'px':>5}  {'weights':<9}{'arrays':>9}{'process':>9}{'estimate':>10}  MiB"
    ]
    for row in rows:
        found = [
            f"{row[name] / 2**20:.0f}" if name in row else "-"
            for name in ("peak_bytes", "process_bytes", "estimate")
        ]
        lines.append(
            f"{row['preset']:<14}{row['size']:>5}  {row['type']:<9}"
            f"{found[0]:>9}{found[1]:>9}{found[2]:>10}"
        )
    return "\n".join(lines)


def training_table(seconds: Mapping[str, float]) -> str:
    """The seconds of `train.loop.speed.measure_training` as aligned text, with their ratios.

    A step is the gradients of full and a sub-network, on average over these, and an update.
    """
    full = seconds["full"]
    lines = [f"{'part of a step':<24}{'seconds':>9}{'of full':>9}{'arithmetic':>12}"]
    for name, value in seconds.items():
        alone = seconds.get(f"{name.removeprefix('full + ')} alone")
        parts = f"{1 + alone / full:>12.2f}" if alone is not None else ""
        lines.append(f"{name:<24}{value:>9.4f}{value / full:>9.2f}{parts}")
    elastic = statistics.mean(v for name, v in seconds.items() if name.startswith("full + "))
    shares = [f"{o} {seconds[o] / (elastic + seconds[o]):.0%}" for o in ("adamw", "muon")]
    lines.append(
        f"gradients of an elastic step: {elastic / full:.2f} times full's on average; share of the "
        f"update in such a step: {', '.join(shares)}"
    )
    return "\n".join(lines)


def ratios_to_peers(results: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each preset: its time in those of its twin and of the public networks."""
    lines = []
    for name in (name for name in results if name in TRANSFORMERS):
        others = [n for n in results if n == f"{name}{TWIN}" or n in PUBLIC]
        own = results[name]["seconds"]
        ratios = [f"{own / results[other]['seconds']:.3g} times {other}" for other in others]
        if ratios:
            lines.append(f"seconds of {name}: {', '.join(ratios)}")
    return "\n".join(lines)


def table(results: dict[str, dict[str, float]], suites: Iterable[Iterable[str]]) -> str:
    """The results as aligned text; speed-ups are against the first row of the suite.

    TFLOP are those of the products in a step, "less" the factor by which they are fewer.
    """
    lines = [
        f"{'preset':<18}{'params':>9}{'s/step':>10}{'speed-up':>10}{'TFLOP':>8}{'less':>7}"
        f"{'peak GiB':>10}  paper ms"
    ]
    for suite in suites:
        rows = [name for name in suite if name in results]
        for name in rows:
            r, first = results[name], results[rows[0]]
            paper = PAPER_LADDER_MS.get(name)
            lines.append(
                f"{name:<18}{r['parameters'] / 1e6:>8.1f}M{r['seconds']:>10.3f}"
                f"{first['seconds'] / r['seconds']:>9.2f}x"
                + (
                    f"{r['flops'] / 1e12:>8.3g}{first['flops'] / r['flops']:>6.2f}x"
                    if "flops" in r and "flops" in first
                    else f"{'-':>8}{'-':>7}"
                )
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
        choices=[*SUITES, *UNUSED, "all"],
        default="all",
        help="ladder: the paper's ablation A to D; widths: the three widths; blocks: one block of "
        "dense and one of sparse attention; peers: our networks and those of PyTorch in turn; "
        "training: an elastic training step; memory: peaks of a step (default: all, which is "
        "ladder, widths and blocks)",
    )
    add(
        "--preset",
        action="append",
        metavar="NAME",
        help="measure this preset or block only, with --suite peers also PRESET-pytorch, which is "
        f"the same network in PyTorch, or {', '.join(PUBLIC)}; repeat for more (default: those of "
        "the suite)",
    )
    add(
        "--size",
        type=integer(32, MOST_PIXELS),
        metavar="PX",
        help="picture height and width in pixels (default: 1024; for the suite memory 256, 512 and "
        "1024; the suite training always has 256)",
    )
    for side in ("height", "width"):
        text = f"picture {side} in pixels (default: --size)"
        add(f"--{side}", type=integer(32, MOST_PIXELS), metavar="PX", help=text)
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
        "--profile",
        action="store_true",
        help="print seconds and share of each kind of operation in a step, and how many times the "
        "seconds of its products it takes (default: off)",
    )
    add(
        "--cpu-seconds",
        action="store_true",
        help="count the CPU seconds of all threads instead of time, for a busy computer (default: "
        "off)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object instead of a table (default: off)",
    )
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    for name in UNUSED.get(args.suite, ()):
        if getattr(args, name) != parser.get_default(name):
            raise UserError(
                f"{option_of(name)} has no effect: leave it out with --suite {args.suite}"
            )
    if args.suite == "training":
        measure_suite_training(args)
        return
    suites = list(SUITES.values())[:-1]
    if args.suite != "all":
        suites = [SUITES[args.suite if args.suite in SUITES else "widths"]]
    if args.preset:
        suites = [args.preset]
    names = list(dict.fromkeys(name for suite in suites for name in suite))
    _check(args, names)
    if args.suite == "memory" or args.profile:
        others = [name for name in names if name not in TRANSFORMERS]
        if others and (args.preset or others == names):
            raise UserError(f"{others[0]} is no preset of a whole network, which this table is of")
        names = [name for name in names if name in TRANSFORMERS]
    if args.suite == "memory":
        measure_suite_memory(args, names)
    elif args.profile:
        print_profiles(args, names)
    else:
        measure_networks(args, names, suites=suites)


def _sides(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width in pixels."""
    size = 1024 if args.size is None else args.size
    return size if args.height is None else args.height, size if args.width is None else args.width


def _check(args: argparse.Namespace, names: Sequence[str]) -> None:
    """`UserError` for a name that the suite does not know, or sides that a network cannot have."""
    peers = [*TRANSFORMERS, *(f"{name}{TWIN}" for name in TRANSFORMERS), *PUBLIC]
    known = peers if args.suite == "peers" else [*TRANSFORMERS, *SUITES["blocks"]]
    for name in names:
        if name not in known:
            where = ": it is in the suite peers" if name in peers else nearest(name, known)
            raise UserError(f"no preset '{name}'{where}")
        unit = max(32, 2 * preset_autoencoder(name.removesuffix(TWIN)).downsampling)
        for side in _sides(args):
            if side % unit:
                raise UserError(f"{name}: picture sides must be multiples of {unit}, got {side}")


def _clock(args: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if args.cpu_seconds else time.perf_counter


def measure_suite_training(args: argparse.Namespace) -> None:
    """Print the seconds of the parts of an elastic training step."""
    if importlib.util.find_spec("train") is None:
        raise UserError("the suite training needs the folder train/ of the repository")
    # This package does not import the other ones.
    speed = importlib.import_module("train.loop.speed")
    seconds = speed.measure_training(repeats=args.repeats, clock=_clock(args))
    _print(args.json, {"seconds": seconds}, text=training_table(seconds))


def measure_suite_memory(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Print the peak memory of a step of each network."""
    sizes = MEMORY_SIZES if args.size is None else (args.size,)
    rows = measure_memory(names, sizes=sizes)
    _print(args.json, {"rows": rows}, text=memory_table(rows))


def print_profiles(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Print the seconds of each kind of operation in a step of each network."""
    how, values, title = _how(args)
    seconds: dict[str, dict[str, float]] = {}
    tables = []
    for name in names:
        gc.collect()
        mx.clear_cache()
        _, step = make_step(name, **how)
        drawn = as_drawn(name, step, how["height"], how["width"])
        whole = time_calls(drawn, args.repeats, clock=_clock(args))["seconds"]
        parts = profile.profile(step, repeats=args.repeats, clock=_clock(args))
        seconds[name] = {k: part.seconds for k, part in parts.items()} | {"step": whole}
        text = f"{name}, {title}\n{profile.table(parts)}\na step as drawn: {whole:.4f} s"
        if mx.default_device().type == mx.DeviceType.cpu:
            times = profile.times_its_products(whole, parts, profile.count_flops(step))
            text = f"{text}, {times:.2f} times its products"
        tables.append(text)
        del step, drawn
    _print(args.json, values | {"seconds": seconds}, text="\n\n".join(tables))


def measure_networks(
    args: argparse.Namespace, names: Sequence[str], *, suites: Iterable[Iterable[str]]
) -> None:
    """Print seconds and peak memory of a step of each network or block."""
    how, values, title = _how(args)
    how |= {"repeats": args.repeats, "clock": _clock(args)}
    if args.suite == "peers":
        results = measure_peers(names, **how)
    else:
        results = {}
        for i, name in enumerate(names):
            print(f"[{i + 1}/{len(names)}] {name} ...", end=" ", file=sys.stderr, flush=True)
            results[name] = measure_network(name, **how)
            print(f"{results[name]['seconds']:.3f} s", file=sys.stderr, flush=True)
    text = f"{title}\n{table(results, suites)}"
    if args.suite == "peers":
        text = f"{text}\n{ratios_to_peers(results)}".rstrip()
    _print(args.json, values | {"presets": results}, text=text)


def _device() -> str:
    return mx.default_device().type.name


def _how(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str]:
    """How to make networks, the same as JSON values, and as a title."""
    (height, width), gpu = _sides(args), mx.default_device().type == mx.DeviceType.gpu
    dtype = args.dtype or ("bfloat16" if gpu else "float32")
    size = {"height": height, "width": width}
    kind = "CPU seconds" if args.cpu_seconds else "seconds"
    values = size | {"dtype": dtype, "repeats": args.repeats, "clock": kind}
    title = f"{height}x{width} px, {dtype}, {_device()}; {kind}, median of {args.repeats}"
    return size | {"dtype": getattr(mx, dtype)}, values, title


def _print(as_json: bool, values: Mapping[str, Any], *, text: str) -> None:
    """Print the machine with the values, or with the text."""
    found = machine()
    if as_json:
        print(json.dumps({"device": _device(), "machine": found, **values}, indent=1), flush=True)
        return
    title = ", ".join(v if k in ("name", "system") else f"{k} {v}" for k, v in found.items())
    print(f"{title}\n{text}", flush=True)


def command() -> None:
    """The console script `mlx-snapgen-benchmark`."""
    run_command(main)


if __name__ == "__main__":
    command()
