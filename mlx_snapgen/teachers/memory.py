"""Memory that a public model takes, estimated from sizes before anything is allocated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.settings import BYTES_PER_PIXEL, machine_memory
from mlx_snapgen.teachers.folder import NETWORKS, TeacherFolder, TeacherNetwork, quantizable

GROUP_SIZE = 64
BASE_BYTES = 1 << 28
"""Of the process without a model."""
DECODER_BYTES = 1 << 30
"""Of the decoder and one tile; larger pictures add `BYTES_PER_PIXEL`."""
ACTIVATIONS = 40
"""Numbers that a block has in memory, in hidden sizes per token. FLUX.2 klein, in 4 bits at 512
pixels on the CPU, took 4475 MiB while denoising; the estimate is 4562."""
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a model takes, in bytes; not all parts are there at once."""

    network: int
    """The transformer, in all its modes."""
    text: int
    """The text encoder, which is freed before denoising."""
    unpacked: int
    """The largest matrix while it is used, where it is dequantized for that: on the CPU."""
    token: int
    """Activations of one token."""
    unit: int
    """Side of a token in pixels."""

    def peak(self, height: int, width: int) -> int:
        """Peak of drawing a picture of height x width pixels."""
        pixels = height * width
        tokens = pixels // self.unit**2 + TEXT_TOKENS
        denoising = self.unpacked + tokens * self.token
        decoding = DECODER_BYTES + pixels * BYTES_PER_PIXEL
        return BASE_BYTES + max(self.text + self.unpacked, self.network + max(denoising, decoding))


def measure(
    network: TeacherNetwork,
    *,
    bits: int,
    group_size: int = GROUP_SIZE,
    networks: int = 1,
    text: int,
    unit: int,
) -> Sizes:
    """The sizes of a model.

    Args:
        network: its transformer; the arrays may be lazy.
        bits: per weight of the transformer's blocks; 0: not quantized.
        networks: number of such transformers in memory.
        text: bytes of the text encoder.
        unit: see `Sizes.unit`.
    """
    whole, packed = _float_bytes(), quantizable(network, group_size) if bits else set()
    values = flat_parameters(network)
    total = sum(
        _packed_bytes(value.size, bits, group_size) if key in packed else value.size * whole
        for key, value in values.items()
    )
    largest = max((values[key].size for key in packed), default=0)
    return Sizes(
        network=total * networks,
        text=text,
        unpacked=2 * largest * whole if whole == 4 else 0,
        token=ACTIVATIONS * network.config.hidden_size * whole,
        unit=unit,
    )


def text_bytes(stored: int, bits: int) -> int:
    """Bytes of a language model in memory, from those of its weights in 16 bits."""
    count = stored // 2
    return _packed_bytes(count, bits, GROUP_SIZE) if bits else count * _float_bytes()


def _packed_bytes(count: int, bits: int, group_size: int) -> int:
    return count * bits // 8 + 2 * _float_bytes() * (count // group_size)


def _float_bytes() -> int:
    """Bytes of a number: everything that is not packed is float32 on the CPU."""
    return 4 if mx.default_device().type == mx.DeviceType.cpu else 2


def measure_folder(folder: TeacherFolder) -> Sizes:
    """The sizes of a model on disk."""
    config, path = folder.config, folder.path
    how = config.quantization or {"bits": 0}
    text: Iterable[Path] = (path / config.text_encoder).glob("*.safetensors")
    return measure(
        NETWORKS[config.kind](config.transformer),
        **how,
        networks=1 + any(path.glob("few_step-*.safetensors")),
        text=sum(file.stat().st_size for file in text),
        unit=config.size_unit,
    )


def check_memory(folder: TeacherFolder, height: int, width: int) -> None:
    """`UserError` with what would fit, unless a picture of this size fits into this machine."""
    sizes, memory, unit = measure_folder(folder), machine_memory(), folder.config.size_unit
    needed = sizes.peak(height, width)
    if needed <= memory:
        return
    choices = []
    for share in range(99, 0, -1):
        h, w = (math.floor(side * share / 100) // unit * unit for side in (height, width))
        if min(h, w) >= unit and sizes.peak(h, w) <= memory:
            choices.append(f"{w} x {h} pixels")
            break
    if (folder.config.quantization or {"bits": 16})["bits"] > 4:
        choices.append("the model converted with --quantize 4")
    if not choices:
        choices.append("a smaller model")
    raise UserError(
        f"{folder.config.name} at {width} x {height} needs about {needed / 2**30:.1f} GiB of "
        f"memory, and this machine has {memory / 2**30:.1f}: choose {' or '.join(choices)}"
    )
