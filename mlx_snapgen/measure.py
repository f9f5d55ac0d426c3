"""Seconds and peak memory of denoising steps with random weights, ours and other networks'."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_snapgen._blas import blas_threads, blas_version
from mlx_snapgen.checkpoint.memory import GROUP_SIZE, needed_bytes, weight_bytes
from mlx_snapgen.checkpoint.module import matrices
from mlx_snapgen.cli.notices import peak_process_bytes
from mlx_snapgen.config import TextEncoderConfig, TransformerConfig
from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.networks.attention import Grid, SelfAttention, SparseSelfAttention
from mlx_snapgen.networks.efficient_dit import EfficientDiT, count_parameters
from mlx_snapgen.networks.parallel import on_all_cores
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.presets import TRANSFORMERS, preset_autoencoder
from mlx_snapgen.settings import machine_memory

MEMORY_TYPES = ("float32", "bfloat16", "8 bits", "4 bits")
TEXT_TOKENS = 154
"""77 of each of the paper's text encoders."""
TWIN = "-pytorch"
"""End of the name of a preset's twin in PyTorch, see `convert.peers`."""
PUBLIC = ("sana-0.6b", "sana-1.6b", "pixart-sigma")
"""Public networks of the suite `peers`."""
PEERS_TEXT_TOKENS = 300
"""Those of SANA and PixArt-Sigma."""


def machine() -> dict[str, str]:
    """What a table of times depends on: the device, the system and the versions in use."""
    device = mx.default_device().type
    name, memory = mx.device_info()["device_name"], f"{machine_memory() / 2**30:.0f} GiB"
    found = {
        "name": f"{name} ({device.name}), {plural(os.cpu_count() or 1, 'core')}, {memory}",
        "system": f"macOS {mac}" if (mac := platform.mac_ver()[0]) else platform.system(),
        "Python": platform.python_version(),
        "mlx": metadata.version("mlx"),
    }
    if device == mx.DeviceType.cpu and (version := blas_version()):
        found["OpenBLAS"] = f"{version} ({plural(blas_threads(), 'thread')})"
    elif device == mx.DeviceType.cpu and platform.system() == "Linux":
        found["BLAS"] = "the reference (slow)"
    if (torch := sys.modules.get("torch")) is not None:
        found["torch"] = f"{torch.__version__} ({plural(torch.get_num_threads(), 'thread')})"
    if "diffusers" in sys.modules:
        found["diffusers"] = metadata.version("diffusers")
    return found


def text_tokens(name: str, of_others: int = TEXT_TOKENS) -> int:
    """Tokens of a prompt for a preset or its twin with one text encoder, `of_others` for others."""
    config = TRANSFORMERS.get(name.removesuffix(TWIN))
    one = config is not None and len(config.text_dims) == 1
    return TextEncoderConfig().max_length if one else of_others


def time_calls(
    run: Callable[[], Any], repeats: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of `run` (median, minimum, maximum), and peak memory in bytes, after a warm-up."""
    mx.eval(run())
    mx.reset_peak_memory()
    seconds = []
    for _ in range(repeats):
        start = clock()
        mx.eval(run())
        seconds.append(clock() - start)
    return _spread(seconds) | {"peak_bytes": mx.get_peak_memory()}


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Seconds of each of `runs`, by name, as in `time_calls`; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in tqdm(range(1 + repeats), desc="rounds", leave=False, disable=None):
        for name, run in runs.items():
            start = clock()
            run()
            if i > 0:  # the first warms up
                seconds[name].append(clock() - start)
    return {name: _spread(values) for name, values in seconds.items()}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
    }


def make_step(
    name: str,
    *,
    height: int,
    width: int,
    dtype: mx.Dtype,
    length: int | None = None,
    bits: int = 0,
) -> tuple[int, Callable[[], mx.array]]:
    """Number of weights of a preset, and a function that computes a denoising step.

    Args:
        height, width: of the picture in pixels.
        length: tokens of all text encoders together; None: `text_tokens`.
        bits: per weight of the linear layers; 0 does not quantize.
    """
    config = dataclasses.replace(TRANSFORMERS[name], widths=(1.0,))
    network = EfficientDiT(config)
    network.set_dtype(dtype)
    if bits:
        chosen = set(matrices(network, GROUP_SIZE))
        nn.quantize(
            network, GROUP_SIZE, bits, class_predicate=lambda path, _: path in chosen
        )  # also on the CPU, where each call dequantizes
    for _, weights in tree_flatten(network.parameters()):
        mx.eval(weights)  # one by one, so that the peak is that of a step
    side = preset_autoencoder(name).downsampling
    x_t = mx.random.normal((1, height // side, width // side, config.latent_channels)).astype(dtype)
    length = (length or text_tokens(name)) // len(config.text_dims)
    states = [
        TextStates(mx.random.normal((1, length, n)).astype(dtype), mx.ones((1, length), mx.bool_))
        for n in config.text_dims
    ]
    text, mask = network.encode_text(states)
    t = mx.array([0.5])
    mx.eval(text, mask, x_t)
    return count_parameters(config), lambda: network(x_t, t, text, mask)


def as_drawn(
    name: str, step: Callable[[], mx.array], height: int, width: int
) -> Callable[[], mx.array]:
    """The step of a preset on the cores that it has in a drawing."""
    side = preset_autoencoder(name).downsampling * TRANSFORMERS[name].patch_size
    return on_all_cores(step, tokens=height * width // side**2)


def what_is_missing(name: str) -> str:
    """The packages that a network of the suite `peers` needs and that are not installed."""
    needed = [] if name in TRANSFORMERS else ["torch", "safetensors", "convert"]
    if needed and not name.endswith(TWIN):
        needed.append("diffusers")
    return ", ".join(package for package in needed if importlib.util.find_spec(package) is None)


def measure_peers(
    names: Sequence[str],
    *,
    height: int,
    width: int,
    dtype: mx.Dtype,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Measure presets and networks of PyTorch, which are all in memory and take turns."""
    how: Any = {"height": height, "width": width}
    made: dict[str, tuple[int, Callable[[], Any]]] = {}
    for name in names:
        if missing := what_is_missing(name):
            way_out = 'pip install -e ".[parity]" in the repository'
            print(f"{name} is skipped: it needs {missing} ({way_out})", file=sys.stderr)
            continue
        print(f"making {name} ...", file=sys.stderr, flush=True)
        length = text_tokens(name, PEERS_TEXT_TOKENS)
        if name in TRANSFORMERS:
            count, step = make_step(name, dtype=dtype, length=length, **how)
            made[name] = count, functools.partial(_evaluate, as_drawn(name, step, height, width))
        else:
            # This package does not import torch.
            peers = importlib.import_module("convert.peers")
            gpu = mx.default_device().type == mx.DeviceType.gpu
            kind = str(dtype).removeprefix("mlx.core.")
            made[name] = peers.make_peer(name, dtype=kind, text_tokens=length, gpu=gpu, **how)
    if not made:
        raise UserError("nothing is left to measure")
    runs = {name: _in_memory(name, run) for name, (_, run) in made.items()}
    results = time_in_turn(runs, repeats, clock=clock)
    return {name: {"parameters": made[name][0], **result} for name, result in results.items()}


def _in_memory(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`; `UserError` where PyTorch or MLX cannot allocate memory."""

    def call() -> Any:
        try:
            return run()
        except RuntimeError as error:
            if "alloc" in str(error) or "out of memory" in str(error):
                raise UserError(f"{name} needs more memory than there is: lower --size") from None
            raise

    return call


def _evaluate(step: Callable[[], mx.array]) -> None:
    mx.eval(step())


def make_block(
    config: TransformerConfig, sparse: bool, *, height: int, width: int, dtype: mx.Dtype
) -> tuple[int, Callable[[], mx.array]]:
    """The same as `make_step`, of the self-attention of one Down-stage block.

    Args:
        sparse: ASSA instead of dense attention.
    """
    module = (SparseSelfAttention if sparse else SelfAttention)(config)
    module.set_dtype(dtype)
    mx.eval(module.parameters())
    grid = Grid(height // 8 // config.patch_size, width // 8 // config.patch_size)
    h = mx.random.normal((1, grid.height * grid.width, config.hidden_size)).astype(dtype)
    weights: Any = tree_flatten(module.parameters())
    return sum(p.size for _, p in weights), lambda: module(h, grid)


def measure_memory(names: Sequence[str], *, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Peak memory of a step of each network of `names`, size and type, measured and estimated.

    Measured is what fits in half of the machine's memory, except bfloat16 on the CPU, where it is
    about fifty times slower, and except what the system ends, for example because other programs
    need the memory.
    """
    rows: list[dict[str, Any]] = []
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    wanted = [(name, size, kind) for name in names for size in sizes for kind in MEMORY_TYPES]
    for name, size, kind in tqdm(wanted, desc="rows", leave=False, disable=None):
        row = {"preset": name, "size": size, "type": kind}
        row["estimate"] = estimate_peak(TRANSFORMERS[name], size=size, kind=kind)
        if row["estimate"] < machine_memory() / 2 and not (on_cpu and kind == "bfloat16"):
            code = "import sys; from mlx_snapgen import measure; measure.print_peak(*sys.argv[1:])"
            command = [sys.executable, "-c", code, name, str(size), kind]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode >= 0:
                done.check_returncode()
                row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
    return rows


def estimate_peak(config: TransformerConfig, *, size: int, kind: str) -> int:
    """Estimate of the bytes of a process that computes a step; `kind` is one of `MEMORY_TYPES`."""
    bits = _bits(kind)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    whole = 4 if kind == "float32" or (bits and on_cpu) else 2
    return needed_bytes(weight_bytes(count_parameters(config), bits, whole=whole), size, size)


def print_peak(name: str, size: str, kind: str) -> None:
    """Print the peak of one step in this process, a row of `measure_memory`, as JSON."""
    gpu = mx.default_device().type == mx.DeviceType.gpu
    bits = _bits(kind)
    dtype = "bfloat16" if bits and gpu else "float32" if bits else kind
    mx.set_cache_limit(0)  # otherwise freed memory counts, and the peak depends on the backend
    how: Any = {"height": int(size), "width": int(size), "bits": bits}
    _, step = make_step(name, dtype=getattr(mx, dtype), **how)
    mx.reset_peak_memory()
    mx.eval(as_drawn(name, step, int(size), int(size))())
    print(json.dumps({"peak_bytes": mx.get_peak_memory(), "process_bytes": peak_process_bytes()}))


def _bits(kind: str) -> int:
    """Bits of a weight in one of `MEMORY_TYPES`; 0 if it is not quantized."""
    return int(kind.split()[0]) if kind.endswith("bits") else 0
