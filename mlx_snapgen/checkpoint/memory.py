"""Memory that a model of this project takes, estimated from sizes before anything is allocated."""

import math
from collections.abc import Callable
from typing import Any

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.module import on_device
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import (
    BYTES_PER_PIXEL,
    DrawSettings,
    ModelChoice,
    has_memory,
    held_widths,
    machine_memory,
    parse_width,
)
from mlx_snapgen.tensor_files import read_header

GROUP_SIZE = 32
"""Of a quantization in memory."""
MOST_AT_ONCE, BATCH_PIXELS = 8, 1 << 18
"""Of a batch by default. More pictures, or larger ones, are hardly faster, and the first picture
appears later."""
DENOISING_BYTES_PER_PIXEL = 320
"""Of each picture in a call of the network, which has twice as many with guidance. Measured in
float32 at 256 x 256: 309 for each further picture with `small`, 138 with `stickers`."""
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
                # Packed weights of unknown bits are an error that loading reports.
                packs = 32 // stored["bits"] if packed and stored["bits"] else 1
                count += math.prod(tensor.shape) * packs
    # A LoRA is merged at full width, before quantization.
    share = 1.0 if choice.loras else parse_width(choice.model_width).share
    whole = 2 if on_device(None) is None else 4
    bits, group_size = choice.quantize, GROUP_SIZE
    if bits is None and len(folder.config.widths) == 1 and not choice.loras:
        bits, group_size = stored["bits"], stored["group_size"]
    bits = None if choice.loras else bits
    return weight_bytes(count * share**2, bits, whole=whole, group_size=group_size)


def weight_bytes(
    count: float, bits: int | None, *, whole: int, group_size: int = GROUP_SIZE
) -> int:
    """Bytes of so many weights.

    Args:
        bits: of a quantized weight; None or 0: they are not quantized.
        whole: bytes of a weight that is not quantized, and of a group's scale and bias.
    """
    return int(count * (bits / 8 + 2 * whole / group_size if bits else whole))


def needed_bytes(
    transformer: int, height: int, width: int, *, pictures: int = 1, guided: bool = False
) -> int:
    """Estimate of the peak of drawing pictures at a time with a transformer of so many bytes.

    They are denoised together and decoded one by one, but for small ones, which take a core each
    and little memory. Measured at 512 x 512 with `stickers`: 548 MiB of arrays for one
    picture and 550 for four.
    """
    denoising = pictures * (2 if guided else 1) * DENOISING_BYTES_PER_PIXEL
    return BASE_BYTES + transformer + height * width * max(BYTES_PER_PIXEL, denoising)


def default_batch_size(
    transformer: int, height: int, width: int, *, most: int | None = None
) -> int:
    """Pictures to draw at a time, which take at most half of the memory.

    Args:
        transformer: its bytes.
        height, width: of a picture in pixels.
        most: pictures; None: at most `MOST_AT_ONCE`, of at most `BATCH_PIXELS` together.
    """
    count = most or min(MOST_AT_ONCE, max(1, BATCH_PIXELS // (height * width)))
    memory = machine_memory() // 2

    def needed(pictures: int) -> int:
        return needed_bytes(transformer, height, width, pictures=pictures, guided=True)

    while count > 1 and needed(count) > memory:
        count -= 1
    return count


def batch_size(settings: DrawSettings, choice: ModelChoice, *, transformer: int) -> int:
    """Pictures to draw at a time with resolved settings, if there are so many.

    Args:
        transformer: its bytes.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    assert settings.height is not None and settings.width is not None
    if choice.low_memory:
        return 1
    return default_batch_size(transformer, settings.height, settings.width)


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
    folder: ModelFolder,
    choice: ModelChoice,
    *,
    height: int = 0,
    width: int = 0,
    pictures: int = 1,
    guided: bool = False,
) -> None:
    """`UserError` with what would fit, unless the model fits, with pictures of this size.

    Args:
        pictures: drawn at a time.
        guided: whether they are drawn with guidance.
    """
    memory, config = machine_memory(), folder.config

    def needed(
        height: int = height, width: int = width, pictures: int = pictures, **changes: object
    ) -> int:
        changed = ModelChoice(**vars(choice) | changes)  # pyright: ignore[reportArgumentType]
        transformer = transformer_bytes(folder, changed)
        return needed_bytes(transformer, height, width, pictures=pictures, guided=guided)

    def fits(height: int = height, width: int = width, **changes: Any) -> bool:
        return needed(height, width, **changes) <= memory

    if fits():
        return
    options = []
    for count in range(pictures - 1, 0, -1):
        if fits(pictures=count):
            options.append(f"--batch-size {count}")
            break
    for other in held_widths(config):
        if other.share < parse_width(choice.model_width).share and fits(model_width=other.name):
            options.append(f"--model-width {other.name}")
            break
    if choice.quantize != 4 and fits(quantize=4):
        options.append("--quantize 4")
    options += smaller_size(height, width, unit=config.size_unit, fits=fits)
    size = f" at {width} x {height}" if height else ""
    size += f" with a batch of {pictures}" if pictures > 1 else ""
    raise UserError(
        f"{config.name}{size} needs about {needed() / 2**30:.1f} GiB of memory, and "
        f"{has_memory()} {memory / 2**30:.1f}: choose {' or '.join(options or ['a smaller model'])}"
    )
