"""Memory that a model of this project takes, estimated from sizes before anything is allocated."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.module import on_device
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import (
    BYTES_PER_PIXEL,
    ModelChoice,
    held_widths,
    machine_memory,
    parse_width,
)
from mlx_snapgen.tensor_files import read_header

GROUP_SIZE = 32
"""Of a quantization in memory."""
BASE_BYTES = 1 << 28
"""Of the process without a model."""


def transformer_bytes(folder: ModelFolder, choice: ModelChoice) -> int:
    """Estimate of the bytes of the transformer, loaded with `choice`.

    0 if its file is missing, which loading reports.
    """
    part = folder.parts["transformer"]
    if not all(path.is_file() for path in part.paths):
        return 0
    stored = part.quantization or {"bits": 0, "group_size": GROUP_SIZE}
    count = 0
    for path in part.paths:
        for name, tensor in read_header(path)[0].items():
            packed = tensor.dtype == "U32"
            if not name.endswith((".scales", ".biases")):
                count += math.prod(tensor.shape) * (32 // stored["bits"] if packed else 1)
    # A LoRA is merged at full width, before quantization.
    share = 1.0 if choice.loras else parse_width(choice.model_width).share
    whole = 4 if on_device(None) == mx.float32 else 2
    bits, group_size = choice.quantize, GROUP_SIZE
    if bits is None and len(folder.config.widths) == 1 and not choice.loras:
        bits, group_size = stored["bits"], stored["group_size"]
    each = bits / 8 + 2 * whole / group_size if bits and not choice.loras else whole
    return int(count * share**2 * each)


def needed_bytes(transformer: int, height: int, width: int) -> int:
    """Estimate of the peak of drawing a picture with a transformer of so many bytes."""
    return BASE_BYTES + transformer + height * width * BYTES_PER_PIXEL


def smaller_size(
    height: int, width: int, *, unit: int, fits: Callable[[int, int], bool]
) -> list[str]:
    """The largest size of about this shape that fits, for a message; empty if there is none."""
    for share in range(99, 0, -1):
        h, w = (math.floor(side * share / 100) // unit * unit for side in (height, width))
        if min(h, w) >= unit and fits(h, w):
            return [f"{w} x {h} pixels"]
    return []


def check_memory(
    folder: ModelFolder, choice: ModelChoice, *, height: int = 0, width: int = 0
) -> None:
    """`UserError` with what would fit, unless the model fits, with a picture of this size."""
    memory, config = machine_memory(), folder.config

    def fits(height: int = height, width: int = width, **changes: object) -> bool:
        changed = ModelChoice(**vars(choice) | changes)  # pyright: ignore[reportArgumentType]
        return needed_bytes(transformer_bytes(folder, changed), height, width) <= memory

    if fits():
        return
    options = []
    for other in held_widths(config):
        if other.share < parse_width(choice.model_width).share and fits(model_width=other.name):
            options.append(f"--model-width {other.name}")
            break
    if choice.quantize != 4 and fits(quantize=4):
        options.append("--quantize 4")
    options += smaller_size(height, width, unit=config.size_unit, fits=fits)
    needed = needed_bytes(transformer_bytes(folder, choice), height, width)
    size = f" at {width} x {height}" if height else ""
    raise UserError(
        f"{config.name}{size} needs about {needed / 2**30:.1f} GiB of memory, and this machine has "
        f"{memory / 2**30:.1f}: choose {' or '.join(options or ['a smaller model'])}"
    )
