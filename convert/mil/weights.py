"""The weight file of a Core ML package, mapped into memory.

weight.bin (coremltools' MILBlob, storage format 2), little-endian, everything at multiples of 64:

    header    64 bytes: uint32 number of blobs, uint32 version 2, zeros
    metadata  64 bytes, one for each blob; a program refers to a blob by its position:
              uint32 sentinel 0xDEADBEEF, uint32 type (`_BLOB_TYPES`), uint64 bytes of data,
              uint64 position of the data, uint64 unused bits in its last byte, zeros
    data      row-major; elements of less than a byte packed from the lowest bit on, across bytes
"""

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.reading import check_regular

_SENTINEL = 0xDEADBEEF

# MIL.proto's DataType -> (name, type in numpy, bits as stored).
DTYPES = {
    1: ("bool", np.bool_, 8),
    2: ("string", np.str_, 0),
    10: ("fp16", np.float16, 16),
    11: ("fp32", np.float32, 32),
    12: ("fp64", np.float64, 64),
    21: ("int8", np.int8, 8),
    22: ("int16", np.int16, 16),
    23: ("int32", np.int32, 32),
    24: ("int64", np.int64, 64),
    25: ("int4", np.int8, 4),
    31: ("uint8", np.uint8, 8),
    32: ("uint16", np.uint16, 16),
    33: ("uint32", np.uint32, 32),
    34: ("uint64", np.uint64, 64),
    35: ("uint4", np.uint8, 4),
    36: ("uint2", np.uint8, 2),
    37: ("uint1", np.uint8, 1),
    38: ("uint6", np.uint8, 6),
    39: ("uint3", np.uint8, 3),
}
_BLOB_TYPES = {
    **{1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4"},
    **{9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32"},
}
"""Type of a blob, which must be the type in the program."""


class TensorType(NamedTuple):
    """Type of a value; a dimension that is not fixed is None."""

    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join('?' if n is None else str(n) for n in self.shape)})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a value without open dimensions; only inputs and outputs may have these."""
        return tuple(n or 0 for n in self.shape)

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def numpy(self) -> type:
        """The numpy type of the values; uint8 or int8 for values of less than a byte."""
        return _BY_NAME[self.dtype][0]

    @property
    def bits(self) -> int:
        """Bits per element in the weight file."""
        return _BY_NAME[self.dtype][1]

    @property
    def floating(self) -> bool:
        return self.dtype.startswith("fp")


_BY_NAME = {name: (kind, bits) for name, kind, bits in DTYPES.values()}


class Blob(NamedTuple):
    """A constant in the weight file, by the position of its metadata."""

    file: str
    offset: int
    type: TensorType


class WeightFile:
    """A mapped weight file; `UserError` when it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            check_regular(path)
            self._data = np.memmap(path, np.uint8, mode="r")
            version = struct.unpack("<II", bytes(self._data[:8]))[1]
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path} cannot be read ({error}): export it again") from None
        if version != 2:
            raise UserError(f"{path} has storage format {version}, only 2 is known")

    def read(self, blob: Blob) -> np.ndarray:
        """A blob as a read-only view of the file; elements of less than a byte as new bytes.

        Raises:
            UserError: there is no blob, or its type is not the one in the program.
        """
        try:
            head = bytes(self._data[blob.offset : blob.offset + 24])
            sentinel, dtype, size, start = struct.unpack("<IIQQ", head)
        except struct.error:
            sentinel = dtype = size = start = 0
        where = f"the weights at byte {blob.offset} of {self.path}"
        if sentinel != _SENTINEL or start + size > len(self._data):
            raise UserError(f"{where} are damaged: export it again")
        kind = _BLOB_TYPES.get(dtype, f"type {dtype}")
        if kind != blob.type.dtype or size != -(-blob.type.num_elements * blob.type.bits // 8):
            raise UserError(f"{where} are {size} bytes of {kind}, the program expects {blob.type}")
        return unpack(self._data[start : start + size], blob.type)


def unpack(raw: np.ndarray, kind: TensorType) -> np.ndarray:
    """Stored bytes -> the tensor; elements of less than a byte from the lowest bit on.

    Raises:
        ValueError: there are too few bytes for the type.
    """
    if raw.nbytes * 8 < kind.num_elements * kind.bits:
        raise ValueError(f"{raw.nbytes} bytes for {kind}")  # numpy would add zeros
    if kind.bits >= 8:
        return raw.view(kind.numpy).reshape(kind.sizes)
    values = unpack_bits(raw, kind.bits, kind.num_elements)
    if kind.dtype == "int4":
        values = (values ^ 8).astype(np.int8) - 8
    return values.astype(kind.numpy).reshape(kind.sizes)


def unpack_bits(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` whole numbers of `bits` bits each in `raw`, as bytes."""
    digits = np.unpackbits(raw, count=count * bits, bitorder="little").reshape(count, bits)
    values = np.zeros(count, np.uint8)
    for i in range(bits):
        values |= digits[:, i] << i
    return values
