"""What the first use of a public model takes: memory, disk, and so how many bits."""

import shutil
import stat
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.t5 import t5_config
from mlx_snapgen.errors import UserError, plural, shown_bytes
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder
from mlx_snapgen.public.description import TEXT_CONFIG, TEXT_ENCODER, PublicModel
from mlx_snapgen.public.files import Files
from mlx_snapgen.reading import read_object
from mlx_snapgen.settings import DrawSettings, ModelChoice, machine_memory
from mlx_snapgen.teachers.memory import GROUP_SIZE, check_sizes, measure, text_bytes, with_loras

DEFAULT_BITS = (0, 8, 4)
"""Quantizations to choose from: the first that leaves half of the machine's memory free, or the
last."""


def text_encoder_bytes(model: PublicModel, files: Files) -> int:
    """Bytes of the text encoder in 16 bits."""
    if model.kind != "minit2i":
        return sum(size for name, size in files.own.items() if name.startswith("text_encoder/"))
    # Its files also have a decoder.
    return 2 * sum(value.size for value in flat_parameters(_t5(model)).values())


def text_encoder_rows(model: PublicModel) -> set[int]:
    """Lengths of the rows of the text encoder's matrices, by its config."""
    if model.kind == "minit2i":
        arrays = flat_parameters(_t5(model)).values()
        return {value.shape[-1] for value in arrays if value.ndim == 2}
    values = read_object(_text_config(model))
    text = values.get("text_config") or values
    # 0, which all divide, for what is not there: the conversion checks the matrices themselves.
    hidden, inner, head = (text.get(n, 0) for n in ("hidden_size", "intermediate_size", "head_dim"))
    return {hidden, inner, head * text.get("num_attention_heads", 1) or hidden}


def _t5(model: PublicModel) -> T5Encoder:
    path = _text_config(model)
    return T5Encoder(t5_config(read_object(path), path))


def _text_config(model: PublicModel) -> Path:
    place = model.text
    folder = model.folder / model.inside / TEXT_ENCODER if place is None else place.folder
    return folder / TEXT_CONFIG


def _side(model: PublicModel) -> int:
    """Default side of a picture in pixels."""
    return getattr(model.network.config, "image_size", 1024)


def peak_memory(
    model: PublicModel, bits: int, text: int, *, size: tuple[int, int] | None = None
) -> int:
    """Peak memory of drawing with a text encoder of `text` bytes in 16 bits; `size`: (height,
    width), None: the default."""
    sizes = measure(model.network, bits=bits, text=text_bytes(text, bits))
    return sizes.peak(*(size or (_side(model), _side(model))))


def check_fits(
    model: PublicModel, choice: ModelChoice, *, settings: DrawSettings, bits: int, text: int
) -> None:
    """`check_memory` before the model is converted.

    Args:
        settings: resolved.
        bits, text: see `peak_memory`.
    """
    # Without quantization, the check of a converted model counts the bytes on the disk, too.
    sizes = measure(model.network, bits=bits, text=text_bytes(text, bits) if bits else text)
    how = {"bits": bits, "group_size": GROUP_SIZE} if bits else None
    check_sizes(
        with_loras(sizes, [lora for lora, _ in choice.loras]),
        replace(model.config, quantization=how),
        choice=choice,
        settings=settings,
    )


def choose_bits(model: PublicModel, text: int) -> int:
    """The first of `DEFAULT_BITS` that leaves half of the machine's memory free."""
    most = machine_memory() // 2
    for bits in DEFAULT_BITS:
        if peak_memory(model, bits, text) <= most:
            return bits
    return DEFAULT_BITS[-1]


def describe_work(
    model: PublicModel,
    files: Files,
    *,
    parts: Path,
    bits: int,
    text: int,
    size: tuple[int, int] | None = None,
) -> str:
    """A line about what the first use does; `UserError` if the disk has no room for it.

    Args:
        size: (height, width) of the pictures; None: the default.
        parts: folder in the cache with what an interrupted call has written.
        bits, text: see `peak_memory`.
    """
    cache = parts.parent
    count = sum(p.size for p in _arrays(model))
    places = [(model.folder, files.own), (model.text and model.text.folder, files.text)]
    fetched = sum(
        size
        for folder, some in places
        for name, size in some.items()
        if folder is None or not (folder / name).is_file()
    )
    kept = kept_bytes(model, files, bits=bits, text=text)
    height, width = size or (_side(model), _side(model))
    memory = peak_memory(model, bits, text, size=(height, width))
    # What an interrupted call wrote, here and into the cache of the downloads, is used again.
    left = [_incomplete(folder) for folder, some in places if some]
    needed = max(0, fetched - sum(resumed for resumed, _ in left))
    needed += max(0, kept - written(parts))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(
            f"{model.name} needs {shown_bytes(needed)} of disk, and {cache} has "
            f"{shown_bytes(free)}: free {shown_bytes(needed - free)} more"
            + (", or choose --quantize 4" if bits != 4 else "")
            + "".join(f"; delete {names}" for _, names in left if names)
        )
    license_, *others = files.licenses
    what = f"{model.name} ({_counted(count)} weights"
    what += f", license {license_})" if license_ else ")"
    if model.text is not None:
        what += f" with {model.text.source}"
        what += f" (license {others[0]})" if others[0] else ""
    number = plural(len(files.own) + len(files.text), "file")
    work = f"fetching {shown_bytes(fetched)} in {number} and " if fetched else ""
    how = f"in {bits} bits" if bits else "without quantization"
    return (
        f"{what}: {work}converting it once, {how}, to {shown_bytes(kept)} in {cache}; drawing "
        f"{width} x {height} takes about {shown_bytes(memory)} of memory"
    )


def written(folder: Path) -> int:
    """Bytes of the files in a folder that another process may fill, or delete; links are none."""
    with suppress(OSError):
        stats = [path.lstat() for path in folder.rglob("*")]
        return sum(found.st_size for found in stats if stat.S_ISREG(found.st_mode))
    return 0


def _incomplete(folder: Path | None) -> tuple[int, str]:
    """Bytes of interrupted downloads, which resume, of the repository whose snapshot is `folder`,
    and a pattern of those that do not; "" without such.

    Their names are those of their blobs. With a random part besides, which newer versions of the
    hub's client give them, they are what a killed process has left, and are not resumed.
    """
    blobs = folder.parent.parent / "blobs" if folder is not None else None
    with suppress(OSError):
        found = list(blobs.glob("*.incomplete")) if blobs else []
        resumed = sum(path.stat().st_size for path in found if "." not in path.stem)
        lost = any("." in path.stem for path in found)
        return resumed, f"{blobs}/*.*.incomplete" if lost else ""
    return 0, ""


def kept_bytes(model: PublicModel, files: Files, *, bits: int, text: int) -> int:
    """About the size of the converted model."""
    # In 16 bits, whatever the type of the transformer's file.
    weights = 2 * sum(p.size for p in _arrays(model)) + (text if model.kind == "minit2i" else 0)
    if model.kind != "minit2i":
        weights += sum(
            size
            for name, size in files.own.items()
            if name.endswith(".safetensors") and not name.startswith("transformer/")
        )
    return int(weights * ((bits + 32 / GROUP_SIZE) / 16 if bits else 1))


def _arrays(model: PublicModel) -> list[Any]:
    return list(flat_parameters(model.network).values())


def _counted(count: int) -> str:
    """A number with a digit that is not 0, however small: 6.2 billion, 2.5 million, 4,000."""
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:,}"
