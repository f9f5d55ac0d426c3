"""Quantization of a loaded network, in memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.module import check_quantization, matrices
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import EfficientDiT

GROUP_SIZE = 32
"""Weights with one scale and one offset."""


def quantize_transformer(transformer: EfficientDiT, bits: int) -> int:
    """Quantize a single-width transformer's linear layers in place.

    Layers whose rows do not divide by `GROUP_SIZE` keep their precision. On Metal and CUDA the
    layers are replaced by packed ones. On the CPU, where MLX's quantized product is forty times
    slower than a dense one, weights are rounded to the values of the packed ones and stay dense:
    pictures have the quantization error, but memory and speed do not change.

    Returns:
        The number of parameters that are now quantized.

    Raises:
        UserError: unsupported bits, several widths, or no layer whose rows divide.
    """
    check_quantization({"transformer": {"bits": bits, "group_size": GROUP_SIZE}}, ["transformer"])
    if transformer.config.widths != (1.0,):
        raise UserError("extract one width before quantizing: packed weights cannot be sliced")
    layers: dict[str, Any] = dict(transformer.named_modules())
    chosen = matrices(transformer, GROUP_SIZE)
    if not chosen:
        raise UserError(f"no layer's rows divide into groups of {GROUP_SIZE}")
    count = sum(layers[path].weight.size for path in chosen)
    if mx.default_device().type == mx.DeviceType.cpu:
        for path in chosen:
            weight = layers[path].weight
            packed = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
            rounded = mx.dequantize(*packed, group_size=GROUP_SIZE, bits=bits)
            layers[path].weight = rounded.astype(weight.dtype)
            mx.eval(layers[path].weight)
    else:
        nn.quantize(
            transformer,
            group_size=GROUP_SIZE,
            bits=bits,
            class_predicate=lambda path, _: path in set(chosen),
        )
        mx.eval(transformer.parameters())
    return count
