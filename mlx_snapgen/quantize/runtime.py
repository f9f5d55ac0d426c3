"""Quantization of a loaded network, in memory."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.module import check_quantization, matrices
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import EfficientDiT


def quantize_transformer(transformer: EfficientDiT, bits: int, *, group_size: int = 32) -> int:
    """Quantize a single-width transformer's linear layers in place.

    Layers whose rows do not divide by `group_size` keep their precision. On Metal and CUDA the
    layers are replaced by packed ones. On the CPU, where MLX's quantized product is forty times
    slower than a dense one, weights are rounded to the values of the packed ones and stay dense:
    pictures have the quantization error, but memory and speed do not change.

    Returns:
        The number of parameters that are now quantized.

    Raises:
        UserError: unsupported bits or group size, several widths, or no layer whose rows divide.
    """
    check_quantization({"transformer": {"bits": bits, "group_size": group_size}}, ["transformer"])
    if transformer.config.widths != (1.0,):
        raise UserError("extract one width before quantizing: packed weights cannot be sliced")
    layers: dict[str, Any] = dict(transformer.named_modules())
    chosen = matrices(transformer, group_size)
    if not chosen:
        raise UserError(f"no layer's rows divide into groups of {group_size}")
    count = sum(layers[path].weight.size for path in chosen)
    if mx.default_device().type == mx.DeviceType.cpu:
        for path in chosen:
            weight = layers[path].weight
            packed = mx.quantize(weight, group_size=group_size, bits=bits)
            rounded = mx.dequantize(*packed, group_size=group_size, bits=bits)
            layers[path].weight = rounded.astype(weight.dtype)
            mx.eval(layers[path].weight)
    else:
        nn.quantize(
            transformer,
            group_size=group_size,
            bits=bits,
            class_predicate=lambda path, _: path in set(chosen),
        )
        mx.eval(transformer.parameters())
    return count
