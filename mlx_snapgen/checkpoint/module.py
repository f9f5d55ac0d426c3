"""The weights of a module in safetensors files, optionally quantized, loaded strictly."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.errors import UserError, naming, nearest
from mlx_snapgen.files import check_link
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.elastic import ElasticLinear, QuantizedElasticLinear
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.reading import read_object
from mlx_snapgen.tensor_files import load_tensors

FORMAT_VERSION = 1

Quantization = Mapping[str, Mapping[str, int]]
"""Component name -> {"bits", "group_size"}."""


class Part(NamedTuple):
    """One component of a model on disk."""

    paths: tuple[Path, ...]
    """Its weight files; a large network has several."""
    config: Any
    """Its config: a dataclass, or JSON values if `read_part` returned it."""
    quantization: dict[str, int] | None
    """How its matrices and convolutions are stored, {"bits", "group_size"}; None: unquantized."""


def check_version(
    where: Path, version: Any, *, reads: int = FORMAT_VERSION, hint: str = "upgrade it"
) -> None:
    """`UserError` unless a file's format version is the one that this package reads."""
    if version != reads:
        raise UserError(
            f"{where} has format version {version}, this mlx_snapgen reads {reads}: {hint}"
        )


def read_part(folder: Path, name: str) -> Part | None:
    """The component `name` from a folder that holds nothing else; None for any other folder.

    `convert.from_torch` writes such folders: `part` in config.json is the component's name, and
    its config has that key.

    Raises:
        UserError: another component, or another format version.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        values = read_object(path)
    except UserError:
        # Another tool's folder may have a file of this name.
        return None
    found, version = values.get("part"), values.get("format_version")
    if found is None:
        return None
    check_version(folder, version, hint="upgrade it, or convert again")
    if found != name or not isinstance(values.get(name), dict):
        raise UserError(f"{folder} holds a part '{found}', not '{name}'")
    quantization = values.get("quantization") or {}
    with naming(path):
        check_quantization(quantization, [name])
    quantization = quantization.get(name)
    return Part((folder / f"{name}.safetensors",), values[name], quantization)


def matrices(module: nn.Module, group_size: int) -> list[str]:
    """Paths of the linear layers and embeddings whose rows divide into groups."""
    return [
        path
        for path, m in module.named_modules()
        if isinstance(m, (ElasticLinear, nn.Linear, nn.Embedding))
        and m.weight.shape[-1] % group_size == 0
    ]


def file_matrices(module: nn.Module, group_size: int) -> list[str]:
    """`matrices` and convolutions: what a quantized file packs. A convolution is used unpacked."""
    convolutions = [
        path
        for path, m in module.named_modules()
        if isinstance(m, nn.Conv2d) and m.weight.shape[-1] % group_size == 0
    ]
    return matrices(module, group_size) + convolutions


def load_stored(module: nn.Module, part: Part, *, packed: bool = False) -> None:
    """Load the weights of `part` into `module`; names and shapes must agree exactly.

    Args:
        packed: keep quantized layers packed in memory, instead of dequantizing their weights.

    Raises:
        UserError: a file is missing or damaged, or has other weights than the module.
    """
    found: dict[str, mx.array] = {}
    for path in part.paths:
        found |= load_weights(path)
    where, how = part.paths[0], part.quantization
    try:
        if how is not None and packed:
            nn.quantize(
                module,
                group_size=how["group_size"],
                bits=how["bits"],
                class_predicate=lambda p, _: f"{p}.scales" in found,
            )
        elif how is not None:
            found = dequantized(found, how, exact=isinstance(module, Autoencoder))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{where} is damaged ({error}): get it again") from None
    whole = [
        key
        for key, value in found.items()
        if not mx.issubdtype(value.dtype, mx.floating)
        and f"{key.removesuffix('weight')}scales" not in found
    ]
    check_fit(shapes(found), shapes(module.parameters()), where, whole_numbers=whole)
    module.update(tree_unflatten(list(found.items())))


def load_weights(path: Path) -> dict[str, mx.array]:
    """The weights in a safetensors file, lazily; `UserError` for a missing or damaged one."""
    check_link(path)
    if not path.is_file():
        raise UserError(f"{path.parent} is incomplete: {path.name} is missing")
    return load_tensors(path)


Shapes = Mapping[str, tuple[int, ...]]


def shapes(weights: Any) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape, of a dict of arrays or a module's nested parameters."""
    return {name: tuple(value.shape) for name, value in flat_parameters(weights).items()}


def check_fit(
    found: Shapes,
    expected: Shapes,
    where: object,
    *,
    what: str = "its config",
    whole_numbers: Sequence[str] = (),
) -> None:
    """`UserError` unless the weights found are exactly those expected.

    Args:
        where: names the weights in the message: "<where> does not fit <what>: it lacks ...".
        whole_numbers: names of weights that are stored as integers but must be floating.
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
    """ "<fault> a and 2 more", or "" without keys."""
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"{fault} {keys[0]}{more}" if keys else ""


EIGHT_BITS = {"bits": 8, "group_size": 32}


def even_steps(weight: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """A weight (..., N) in `EIGHT_BITS`, packed as by `mx.quantize`: weight, scales, biases.

    A group's numbers are multiples, -127 to 127, of a bfloat16 number. So they stay the same when
    they are quantized again, which those of `mx.quantize` do not.
    """
    groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, EIGHT_BITS["group_size"])
    scales = (mx.abs(groups).max(-1) / 127).astype(mx.bfloat16)
    steps = mx.where(scales == 0, 1, scales.astype(mx.float32))
    whole = mx.clip(mx.round(groups / steps[..., None]), -127, 127) + 128
    packed = whole.astype(mx.uint8).reshape(weight.shape).view(mx.uint32)
    return packed, scales, -128 * scales


def rounded(weight: mx.array) -> mx.array:
    """A weight as it is after `even_steps`, in float32."""
    packed, scales, biases = even_steps(weight)
    found = dequantized(
        {"x.weight": packed, "x.scales": scales, "x.biases": biases}, EIGHT_BITS, exact=True
    )
    return found["x.weight"]


def dequantized(
    weights: Mapping[str, mx.array], how: Mapping[str, int], *, exact: bool = False
) -> dict[str, mx.array]:
    """Replace every packed `X.weight`, `X.scales`, `X.biases` by a floating `X.weight`.

    Args:
        exact: in float32, also if the scales have another type.
    """
    weights = dict(weights)
    for key in [k for k in weights if k.endswith(".scales")]:
        name = key.removesuffix(".scales")
        scales, biases = weights.pop(key), weights.pop(f"{name}.biases", None)
        if biases is None or f"{name}.weight" not in weights:
            raise ValueError(f"{key} has no {name}.weight and {name}.biases beside it")
        if exact:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weights[f"{name}.weight"] = mx.dequantize(
            weights[f"{name}.weight"],
            scales,
            biases,
            group_size=how["group_size"],
            bits=how["bits"],
        )
    return weights


def cast(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Give all floating weights the type `dtype`, lazily; None keeps their types."""
    if dtype is not None:
        # Packed weights are integers and keep their type.
        module.apply(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x)


def on_device(dtype: mx.Dtype | None) -> mx.Dtype | None:
    """`dtype`; None is float32 on the CPU, and the stored type on a GPU."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return mx.float32 if dtype is None and on_cpu else dtype


def dequantize_on_cpu(module: nn.Module) -> None:
    """On the CPU, make packed layers dequantize their weights (see `QuantizedElasticLinear`)."""
    if mx.default_device().type == mx.DeviceType.cpu:
        for _, layer in module.named_modules():
            if type(layer) is nn.QuantizedLinear:
                # A subclass with the same parameters.
                layer.__class__ = QuantizedElasticLinear


def materialize(module: nn.Module, dtype: mx.Dtype | None) -> None:
    """Read lazy weights one by one, so that peak memory is that of the sub-network alone."""
    cast(module, dtype)
    # A slice would keep the whole original tensor in memory.
    module.apply(mx.contiguous)
    for weight in flat_parameters(module).values():
        mx.eval(weight)


BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def check_quantization(quantization: Quantization, components: Collection[str]) -> None:
    """`UserError` unless MLX supports the quantization and its components are in `components`."""
    if not isinstance(quantization, dict):
        raise UserError(f"quantization must be an object, not {quantization!r}")
    for name, how in quantization.items():
        if name not in components:
            raise UserError(f"no component '{name}' to quantize{nearest(name, components)}")
        if not isinstance(how, dict) or set(how) != {"bits", "group_size"}:
            raise UserError(f"quantization of {name} needs bits and group_size, got {how}")
        whole = all(type(value) is int for value in how.values())
        if not whole or how["bits"] not in BITS or how["group_size"] not in GROUP_SIZES:
            raise UserError(
                f"{name} cannot be quantized to {how['bits']} bits in groups of "
                f"{how['group_size']}: bits are one of {BITS}, groups one of {GROUP_SIZES}"
            )
