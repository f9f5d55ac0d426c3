"""The contents of a Core ML package."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from convert.mil.program import Function, Operation, Package
from convert.mil.weights import Blob, TensorType

LAYOUT_OPS = ("transpose", "reshape")
"""Operations that only move numbers, which are slow on the Neural Engine."""


def summary(package_path: str | Path) -> dict[str, Any]:
    """The contents of a package as JSON values; nothing is computed.

    Returns:
        `functions`: for each its `inputs` and `outputs` (name -> "fp16 (1, 8, 16, 16)"), the number
        of `operations` by type, most frequent first, without constants, and the `layout_operations`
        among them (see `LAYOUT_OPS`). `default_function`, `specification_version`, `weight_bytes`
        (size of the weight file), `palettized_weights` (weights stored as indices into palettes),
        `palettes` (their number, several for a grouped weight), `bits_per_index`
        (average over the numbers in palettized weights), `weights` (numbers in floating weights
        from the file) and `bits_per_weight` (bits of all that is stored for them, palettes and
        scales included, for each). Weights that functions share count once.

    Raises:
        UserError: see `Package`.
    """
    package = Package(package_path)
    functions = {}
    stored: dict[tuple, tuple[int, int]] = {}  # blobs of a weight -> (numbers, bits)
    palettized: dict[tuple, tuple[int, int, float]] = {}  # -> palettes, numbers, bits
    for name, function in package.functions.items():
        types = function.types()
        counts = Counter(o.type for o in function.operations if not o.is_constant)
        functions[name] = {
            "inputs": {n: str(kind) for n, kind in function.inputs.items()},
            "outputs": {n: str(types[n]) for n in function.outputs},
            "operations": dict(counts.most_common()),
            "layout_operations": {kind: counts[kind] for kind in LAYOUT_OPS},
        }
        for weight, blobs, kind in _weights(function):
            key = tuple(b.offset for b in blobs)
            bits = sum(b.type.num_elements * b.type.bits for b in blobs)
            stored[key] = kind.num_elements, bits
            if weight.type == "constexpr_lut_to_dense":
                count, bits = _palettes(weight, types)
                palettized[key] = count, stored[key][0], stored[key][0] * bits
    numbers, bits = (sum(x) for x in zip(*stored.values(), strict=True)) if stored else (0, 0)
    palettes, indices, index_bits = (
        sum(x) for x in zip((0, 0, 0), *palettized.values(), strict=True)
    )
    return {
        "specification_version": package.specification_version,
        "default_function": package.default_function,
        "functions": functions,
        "weight_bytes": package.weight_bytes(),
        "palettized_weights": len(palettized),
        "palettes": palettes,
        "bits_per_index": round(index_bits / indices, 3) if indices else 0.0,
        "weights": numbers,
        "bits_per_weight": round(bits / numbers, 3) if numbers else 0.0,
    }


def _weights(function: Function):
    """(operation, its blobs in the weight file, type) of each floating weight."""
    made = {name: op for op in function.operations for name in op.outputs}
    parts = {
        b
        for op in function.operations
        if op.type.startswith("constexpr_")
        for bindings in op.inputs.values()
        for b in bindings
        if isinstance(b, str)
    }

    def blobs(operation: Operation) -> list[Blob]:
        found = []
        for binding in (b for bindings in operation.inputs.values() for b in bindings):
            if isinstance(binding, str):
                found += blobs(made[binding])
            elif isinstance(binding.value, Blob):
                found.append(binding.value)
        return found

    for operation in (o for o in function.operations if o.is_constant):
        for name, kind in operation.outputs.items():
            if kind.floating and name not in parts and (found := blobs(operation)):
                yield operation, found, kind


def _palettes(operation: Operation, types: dict[str, TensorType]) -> tuple[int, float]:
    """How many palettes a weight has, and the bits of indices into them for each number."""
    (lut,) = operation.inputs["lut"]
    if isinstance(lut, str):
        shape = types[lut].sizes
    else:
        shape = lut.value.type.sizes if isinstance(lut.value, Blob) else np.shape(lut.value)
    if len(shape) == 1:
        return 1, shape[0].bit_length() - 1
    *groups, entries, numbers = shape
    return math.prod(groups), (entries.bit_length() - 1) / numbers
