"""Memory that a public model takes, estimated from sizes before anything is allocated."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.memory import BASE_BYTES, smaller_size
from mlx_snapgen.errors import UserError
from mlx_snapgen.fitting import MAX_REFERENCE
from mlx_snapgen.lora.files import lora_file
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.minit2i import MiniT2ITransformer
from mlx_snapgen.picture_files import picture_size
from mlx_snapgen.settings import (
    BYTES_PER_PIXEL,
    DrawSettings,
    ModelChoice,
    has_memory,
    machine_memory,
)
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.folder import NETWORKS, TeacherFolder, TeacherNetwork, quantizable
from mlx_snapgen.tensor_files import read_header

GROUP_SIZE = 64
CODER_BYTES, CODER_BYTES_PER_PIXEL, UNTILED_BYTES = 600 << 20, 1150, 1400 << 20
"""Of an encoder or decoder with one tile; of a picture's widest features; and of a small picture,
which runs at once. On the CPU, in float32, FLUX.2's decoder, with 190 MiB of weights, took 1298 MiB
at 256 pixels, 845 at 512 and 1711 at 1024, and its encoder, with 131 MiB, 1398, 623 and 1468;
Flux's are the same networks. Qwen-Image's encoder took 1098 at 1024."""
ACTIVATIONS = 40
"""Numbers that a block has in memory, in hidden sizes per token. FLUX.2 klein, in 4 bits at 512
pixels on the CPU, took 4475 MiB while denoising; the estimate is 4562. Three blocks with a mask at
256 pixels, whose picture the network also sees, took 2053; the estimate is 2164."""
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a model takes, in bytes; not all parts are there at once."""

    network: int
    """The transformer, in all its modes, with its LoRAs."""
    text: int
    """The text encoder."""
    unpacked: int
    """The largest matrix while it is used, where it is dequantized for that: on the CPU."""
    token: int
    """Activations of one token."""
    unit: int
    """Side of a token in pixels."""
    has_autoencoder: bool = True
    """False for a network that draws pixels."""

    def peak(
        self,
        height: int,
        width: int,
        *,
        low_memory: bool = False,
        keep_text_encoders: bool = False,
        encoded: int = 0,
        references: int = 0,
    ) -> int:
        """Peak of drawing a picture of height x width pixels.

        Args:
            low_memory: the transformer is freed before decoding.
            keep_text_encoders: the text encoder is not freed before denoising.
            encoded: pixels of the largest picture to start from; 0: there is none.
            references: pixels of all pictures that the network sees besides.
        """
        pixels = height * width
        tokens = (pixels + references) // self.unit**2 + TEXT_TOKENS
        kept = 0 if low_memory else self.network
        pictures = [kept + pixels * BYTES_PER_PIXEL]
        if self.has_autoencoder:
            pictures = [kept + _coder_bytes(pixels)]
            if encoded:
                pictures.append(self.network + _coder_bytes(encoded))
        drawing = max(self.network + self.unpacked + tokens * self.token, *pictures)
        if keep_text_encoders:
            return BASE_BYTES + self.text + drawing
        return BASE_BYTES + max(self.text + self.unpacked, drawing)


def _coder_bytes(pixels: int) -> int:
    """Of encoding or decoding a picture."""
    return max(UNTILED_BYTES, CODER_BYTES + pixels * CODER_BYTES_PER_PIXEL)


def measure(
    network: TeacherNetwork,
    *,
    bits: int,
    group_size: int = GROUP_SIZE,
    networks: int = 1,
    text: int,
) -> Sizes:
    """The sizes of a model.

    Args:
        network: its transformer; the arrays may be lazy.
        bits: per weight of the transformer's blocks; 0: not quantized.
        networks: number of such transformers in memory.
        text: bytes of the text encoder.
    """
    whole, packed = float_bytes(), quantizable(network, group_size) if bits else set()
    values = flat_parameters(network)
    total = sum(
        _packed_bytes(value.size, bits, group_size) if key in packed else value.size * whole
        for key, value in values.items()
    )
    # All known autoencoders make a latent of 8 x 8 pixels.
    has_autoencoder = not isinstance(network, MiniT2ITransformer)
    largest = max((values[key].size for key in packed), default=0)
    return Sizes(
        network=total * networks,
        text=text,
        unpacked=2 * largest * whole if whole == 4 else 0,
        token=ACTIVATIONS * network.config.hidden_size * whole,
        unit=network.config.patch_size * (8 if has_autoencoder else 1),
        has_autoencoder=has_autoencoder,
    )


def text_bytes(stored: int, bits: int) -> int:
    """Bytes of a language model in memory, from those of its weights in 16 bits."""
    count = stored // 2
    return _packed_bytes(count, bits, GROUP_SIZE) if bits else count * float_bytes()


def _packed_bytes(count: int, bits: int, group_size: int) -> int:
    return count * bits // 8 + 2 * float_bytes() * (count // group_size)


def float_bytes() -> int:
    """Bytes of a number: everything that is not packed is float32 on the CPU."""
    return 4 if mx.default_device().type == mx.DeviceType.cpu else 2


def measure_folder(folder: TeacherFolder, loras: Iterable[str] = ()) -> Sizes:
    """The sizes of a model on disk, with LoRAs by their files or folders."""
    config, path = folder.config, folder.path
    networks = 1 + any(path.glob("few_step-*.safetensors"))
    how = config.quantization or {"bits": 0}
    text: Iterable[Path] = (path / config.text_encoder).glob("*.safetensors")
    sizes = measure(
        NETWORKS[config.kind](config.transformer),
        **how,
        networks=networks,
        text=sum(file.stat().st_size for file in text),
    )
    return with_loras(sizes, loras, networks=networks)


def with_loras(sizes: Sizes, loras: Iterable[str], *, networks: int = 1) -> Sizes:
    """`sizes` with LoRAs, by their files or folders, in each of the networks."""
    headers = (read_header(lora_file(lora))[0] for lora in loras)
    count = sum(math.prod(tensor.shape) for header in headers for tensor in header.values())
    return replace(sizes, network=sizes.network + count * float_bytes() * networks)


def peak_bytes(
    folder: TeacherFolder, choice: ModelChoice, *, settings: DrawSettings
) -> Callable[..., int]:
    """Estimate of the peak of drawing with resolved settings: a function of height and width in
    pixels, and of fields of the choice that are to be others."""
    sizes = measure_folder(folder, [lora for lora, _ in choice.loras])
    return _peak(sizes, folder.config, choice=choice, settings=settings)


def _peak(
    sizes: Sizes, config: TeacherConfig, *, choice: ModelChoice, settings: DrawSettings
) -> Callable[..., int]:
    """See `peak_bytes`."""
    edit = [min(math.prod(picture_size(source)), MAX_REFERENCE) for source in settings.edit]
    starts = settings.image is not None
    is_reference = settings.mask is not None and config.abilities().edit

    def peak(height: int, width: int, **changes: bool) -> int:
        drawn, chosen = height * width, replace(choice, **changes)
        return sizes.peak(
            height,
            width,
            low_memory=chosen.low_memory,
            keep_text_encoders=chosen.keep_text_encoders,
            encoded=max([drawn * starts, *edit]),
            references=sum(edit) + drawn * is_reference,
        )

    return peak


def check_memory(folder: TeacherFolder, choice: ModelChoice, *, settings: DrawSettings) -> None:
    """`UserError` with what would fit, unless a picture of these settings fits into this machine.

    Args:
        settings: resolved.
    """
    sizes = measure_folder(folder, [lora for lora, _ in choice.loras])
    check_sizes(sizes, folder.config, choice=choice, settings=settings)


def check_sizes(
    sizes: Sizes, config: TeacherConfig, *, choice: ModelChoice, settings: DrawSettings
) -> None:
    """`check_memory` for a model of these sizes."""
    memory, unit = machine_memory(), config.size_unit
    height, width = settings.height, settings.width
    assert height is not None and width is not None
    peak = _peak(sizes, config, choice=choice, settings=settings)
    needed = peak(height, width)
    if needed <= memory:
        return
    choices = []
    if peak(height, width, keep_text_encoders=False) <= memory:
        choices.append("text encoders that are not kept in memory")
    if peak(height, width, low_memory=True) <= memory:
        choices.append("--low-memory")
    choices += smaller_size(height, width, unit=unit, fits=lambda h, w: peak(h, w) <= memory)
    if (config.quantization or {"bits": 16})["bits"] > 4:
        choices.append("the model converted with --quantize 4")
    if not choices:
        choices.append("a smaller model")
    raise UserError(
        f"{config.name} at {width} x {height} needs about {needed / 2**30:.1f} GiB of "
        f"memory, and {has_memory()} {memory / 2**30:.1f}: choose {' or '.join(choices)}"
    )
