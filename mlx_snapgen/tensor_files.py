"""Safetensors files of unknown origin, checked before they are read.

MLX reads tensors at their first use and at the places that the header gives, so an error there
comes late, or ends the process.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import is_unicode
from mlx_snapgen.reading import open_regular, parse_json

BYTES = {
    **{"BOOL": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8},
    **{"F16": 2, "BF16": 2, "F32": 4, "C64": 8, "F8_E4M3": 1},
}
"""Bytes of an element, by the type's name in a header; those that MLX reads."""
MOST_HEADER = 10**8
"""Bytes of a header; the limit of the format's own library."""
MOST_ELEMENTS = 2**31 - 1
"""Of a side; MLX's sizes are 32-bit."""


class Tensor(NamedTuple):
    """An entry of a header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Type and shape of each tensor in a safetensors file, and the file's metadata.

    Raises:
        UserError: no such file, one that is no safetensors or is cut off, or a tensor of a type
            that MLX does not read.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb", opener=open_regular) as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or 8 + length > size:
                raise UserError(f"{path} is truncated, or no safetensors file: get it again")
            if length > MOST_HEADER:
                raise UserError(f"{path} is damaged: its header has {length} bytes: get it again")
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} is damaged, or no safetensors file: get it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path} is damaged: its metadata is no text: get it again")
    found = {name: _checked(path, name, entry) for name, entry in header.items()}
    ends = [entry["data_offsets"][1] for entry in header.values()]
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise UserError(f"{path} is truncated: {size} of {whole} bytes, get it again")
    return found, metadata


def load_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazily; `UserError` for one that is damaged.

    Those in FP8 (E4M3) become bfloat16, which has all of its numbers.
    """
    header, _ = read_header(path)
    try:
        with open(path, "rb", opener=open_regular) as file:
            # MLX takes only names that are UTF-8, and would read a file object in other threads.
            name = str(path) if is_unicode(path) else f"/dev/fd/{file.fileno()}"
            tensors = mx.load(name, format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    assert isinstance(tensors, dict)
    # MLX has no type for FP8, and reads it as bytes.
    return {
        name: mx.from_fp8(value) if header[name].dtype == "F8_E4M3" and value.size else value
        for name, value in tensors.items()
    }


def check_entry(entry: Any) -> None:
    """`ValueError` or `LookupError` unless the type, shape and place of a tensor fit together."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in shape)
        if not whole or type(start) is not int or type(end) is not int or not 0 <= start <= end:
            raise ValueError
        if dtype in BYTES and end - start != math.prod(shape) * BYTES[dtype]:
            raise ValueError
    except TypeError:
        raise ValueError from None


def _checked(path: Path, name: str, entry: Any) -> Tensor:
    try:
        check_entry(entry)
        dtype, shape = entry["dtype"], entry["shape"]
        if dtype not in BYTES:
            raise UserError(
                f"{path}: {name} is of the type {dtype}, which is not supported: convert the file "
                "to float16 first"
            )
    except (ValueError, LookupError):
        raise UserError(f"{path} is damaged: get it again ({name} does not fit)") from None
    return Tensor(dtype, tuple(shape))
