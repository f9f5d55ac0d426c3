"""The weights of one module in one safetensors file, perhaps quantized, loaded strictly.

A part is a model folder with one component in it, as `convert.from_torch` writes it: config.json
has `part`, the component's name, and under that name its config.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.networks.elastic import ElasticLinear

FORMAT_VERSION = 1

Quantization = Mapping[str, Mapping[str, int]]
"""Component name -> {"bits", "group_size"}."""


def read_part(folder: Path, name: str) -> tuple[dict[str, Any], Quantization] | None:
    """Config values and quantization of the part `name` in `folder`, None when it is no part.

    Raises:
        UserError: another part, or one of another format version.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found, version = values.get("part"), values.get("format_version")
    except (OSError, ValueError, AttributeError):
        return None
    if found is None:
        return None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}, this mlx_snapgen reads {FORMAT_VERSION}: "
            "upgrade it, or convert again"
        )
    if found != name or not isinstance(values.get(name), dict):
        raise UserError(f"{folder} holds a part '{found}', not '{name}'")
    return values[name], values.get("quantization") or {}


def matrices(module: nn.Module, group_size: int) -> list[str]:
    """Paths of the linear layers and embeddings whose rows divide into groups."""
    return [
        path
        for path, m in module.named_modules()
        if isinstance(m, (ElasticLinear, nn.Linear, nn.Embedding))
        and m.weight.shape[-1] % group_size == 0
    ]


def load_stored(
    module: nn.Module,
    folder: Path,
    name: str,
    quantization: Quantization | None = None,
    packed: bool = False,
) -> None:
    """Put the weights of `name`.safetensors into `module`, all of them and nothing else.

    Args:
        quantization: how the components of `folder` are stored.
        packed: leave quantized layers packed in memory, instead of dequantizing their weights.

    Raises:
        UserError: a file that is missing or damaged, or holds other weights than the module's.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} is incomplete: {path.name} is missing")
    try:
        found = mx.load(str(path))
        how = (quantization or {}).get(name)
        if how is not None and packed:
            nn.quantize(module, **how, class_predicate=lambda p, _: f"{p}.scales" in found)
        elif how is not None:
            found = dequantized(found, how)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    whole = [
        key
        for key, value in found.items()
        if not mx.issubdtype(value.dtype, mx.floating)
        and f"{key.removesuffix('weight')}scales" not in found
    ]
    check_fit(shapes(found), shapes(module.parameters()), path, whole_numbers=whole)
    module.update(tree_unflatten(list(found.items())))


Shapes = Mapping[str, tuple[int, ...]]


def shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape, of a dict of arrays or a module's nested parameters."""
    return {name: tuple(value.shape) for name, value in tree_flatten(weights)}


def check_fit(
    found: Shapes,
    expected: Shapes,
    where: object,
    *,
    what: str = "its config",
    whole_numbers: Sequence[str] = (),
) -> None:
    """`UserError` unless there are just the weights expected.

    Args:
        where: names the weights in the message: "<where> does not fit <what>: it lacks ...".
        whole_numbers: weights that are stored as integers and should not be.
    """
    faults = [
        listed("lacks", [name for name in expected if name not in found]),
        listed("has the unknown", [name for name in found if name not in expected]),
        listed(
            "misshapes",
            [
                f"{name} {shape} instead of {expected[name]}"
                for name, shape in found.items()
                if name in expected and shape != expected[name]
            ],
        ),
        listed("stores as whole numbers", whole_numbers),
    ]
    if any(faults):
        raise UserError(f"{where} does not fit {what}: it " + "; ".join(filter(None, faults)))


def listed(fault: str, keys: Sequence[str]) -> str:
    """ "<fault> a, b, c and 2 more", or "" without keys."""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{fault} {', '.join(keys[:3])}{more}" if keys else ""


def dequantized(weights: Mapping[str, mx.array], how: Mapping[str, int]) -> dict[str, mx.array]:
    """Replace every packed `X.weight`, `X.scales`, `X.biases` by a floating `X.weight`."""
    weights = dict(weights)
    for key in [k for k in weights if k.endswith(".scales")]:
        name = key.removesuffix(".scales")
        scales, biases = weights.pop(key), weights.pop(f"{name}.biases", None)
        if biases is None or f"{name}.weight" not in weights:
            raise ValueError(f"{key} has no {name}.weight and {name}.biases beside it")
        weights[f"{name}.weight"] = mx.dequantize(weights[f"{name}.weight"], scales, biases, **how)
    return weights


def materialise(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Read the lazy weights one by one, so that a sub-network's peak is not the supernetwork's."""

    def keep(value: mx.array) -> bool:
        # Packed weights of a quantized text encoder are whole numbers.
        return dtype is None or not mx.issubdtype(value.dtype, mx.floating)

    cast = [
        # A slice would otherwise keep the whole tensor it was cut from.
        (name, mx.contiguous(value if keep(value) else value.astype(dtype)))
        for name, value in tree_flatten(module.parameters())
    ]
    module.update(tree_unflatten(cast))
    for _, value in cast:
        mx.eval(value)


BITS = (2, 3, 4, 5, 6, 8)


GROUP_SIZES = (32, 64, 128)


def check_quantization(quantization: Quantization, components: Sequence[str]) -> None:
    for name, how in quantization.items():
        if name not in components:
            raise UserError(f"no component '{name}' to quantize{nearest(name, components)}")
        if set(how) != {"bits", "group_size"}:
            raise UserError(f"quantization of {name} needs bits and group_size, got {dict(how)}")
        if how["bits"] not in BITS or how["group_size"] not in GROUP_SIZES:
            raise UserError(
                f"{name} cannot be quantized to {how['bits']} bits in groups of "
                f"{how['group_size']}: bits are one of {BITS}, groups one of {GROUP_SIZES}"
            )
