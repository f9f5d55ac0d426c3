"""One Core ML package: PyTorch networks traced, converted, palettized, and joined as functions."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.libraries import import_coremltools, quiet_coremltools
from convert.mil.summary import summary
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded

PALETTE_BITS = (1, 2, 3, 4, 6, 8)
"""Bits of an index that Core ML has."""


class Network(NamedTuple):
    """A network to convert."""

    module: Any
    inputs: Mapping[str, Any]
    """Example tensors by name, in the order of the module's arguments."""
    outputs: tuple[str, ...]
    least: int = 0
    """Layers with at least this many weights have palettes; 0 for none."""


def convert(network: Network, *, target: str, precision: str, is_alone: bool = True) -> Any:
    """A network as an MLModel, traced on its example inputs.

    Args:
        is_alone: False for one of several functions that share their palettes.
    """
    ct = import_coremltools()
    import torch

    half = precision == "float16"
    floating = np.float16 if half else np.float32

    def described(name: str, value: Any) -> Any:
        if not value.is_floating_point():
            return ct.TensorType(name=name, shape=value.shape, dtype=np.int32)
        return ct.TensorType(
            name=name, shape=value.shape, dtype=np.float32 if name == "t" else floating
        )

    pipeline = ct.PassPipeline()
    # Deduplicate axes, strides and other small constants too: they are half of a program.
    pipeline.set_options("common::const_deduplication", {"const_threshold": 0})
    if network.least and not is_alone:
        # It would scale the weights of one width, which then differ from those of the others.
        pipeline.remove_passes({"common::fuse_conv_scale"})
    traced = torch.jit.trace(network.module, tuple(network.inputs.values()), check_trace=False)
    model = ct.convert(
        traced,
        convert_to="mlprogram",
        inputs=[described(name, value) for name, value in network.inputs.items()],
        outputs=[ct.TensorType(name=name, dtype=floating) for name in network.outputs],
        minimum_deployment_target=getattr(ct.target, target.replace("ios", "iOS")),
        compute_precision=(
            ct.transform.FP16ComputePrecision(op_selector=_not_an_angle)
            if half
            else ct.precision.FLOAT32
        ),
        pass_pipeline=pipeline,
        skip_model_load=True,
    )
    return _with_palettes(model, network.least) if network.least else model


def _not_an_angle(operation: Any) -> bool:
    """Whether an operation may be fp16. Angles go up to 1000, where fp16 has steps of 0.5."""
    if operation.op_type in ("sin", "cos"):
        return False
    if operation.op_type not in ("mul", "reshape", "expand_dims", "cast"):
        return True
    return all(_not_an_angle(child) for value in operation.outputs for child in value.child_ops)


def _with_palettes(model: Any, least: int) -> Any:
    """Store the weights of layers, which have few distinct values, as indices; exact."""
    from coremltools.optimize.coreml import (
        OpPalettizerConfig,
        OptimizationConfig,
        palettize_weights,
    )

    # Layers only: a global configuration would include RoPE tables too.
    config = OptimizationConfig()
    how = OpPalettizerConfig(mode="custom", lut_function=palette_of, weight_threshold=least - 1)
    config.set_op_type("conv", how)
    return palettize_weights(model, config)


def palette_of(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a weight, filled up with zeros, and the index of each number.

    coremltools' mode "unique" sorts float16 numbers, and NumPy 2.3 does not sort thousands of them
    on some CPUs with AVX-512.
    """
    values, indices = np.unique(weight.astype(np.float32), return_inverse=True)
    bits = next(n for n in PALETTE_BITS if len(values) <= 2**n)
    palette = np.zeros(2**bits, weight.dtype)
    palette[: len(values)] = values
    return palette, indices.ravel().astype(np.uint8)


def write_package(
    path: Path,
    functions: Mapping[str, Network],
    *,
    target: str,
    precision: str,
    about: Mapping[str, Any],
    description: str,
) -> dict[str, Any]:
    """Convert networks and write them as one package.

    Args:
        functions: name -> network; the first is the package's default. A single one is named
            "main"; several share equal weights, which needs iOS 18.
        about: further metadata of the package.

    Returns:
        `parameters` of the first network, `bytes`, `seconds`, and what
        `convert.mil.summary.summary` returns.
    """
    ct = import_coremltools()
    start = time.perf_counter()

    def saved(network: Network, to: Path) -> None:
        is_alone = len(functions) == 1
        model = convert(network, target=target, precision=precision, is_alone=is_alone)
        model.short_description = description
        model.user_defined_metadata.update({k: str(v) for k, v in about.items()})
        model.save(str(to))

    with quiet_coremltools(path.stem), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        if len(functions) == 1:
            saved(next(iter(functions.values())), path)
        else:
            shared = ct.utils.MultiFunctionDescriptor()
            for name, network in functions.items():
                part = Path(folder) / f"{name}.mlpackage"
                saved(network, part)
                shared.add_function(str(part), "main", name)
            shared.default_function_name = next(iter(functions))
            ct.utils.save_multifunction(shared, str(path))
    for debris in path.rglob("executorch_debug_handle_mapping.json"):
        debris.unlink()
    for file in path.rglob("*"):
        # coremltools makes the program readable for its owner only.
        file.chmod(file.stat().st_mode | 0o044 | (0o011 if file.is_dir() else 0))
    network = next(iter(functions.values()))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "parameters": sum(p.numel() for p in network.module.parameters()),
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 1),
    } | summary(path)


def line(name: str, package: Mapping[str, Any]) -> str:
    """One line about a package that `write_package` wrote."""
    function = package["functions"][package["default_function"]]
    layout = ", ".join(f"{n} {kind}s" for kind, n in function["layout_operations"].items())
    bits = f"{package['bits_per_index']:g}-bit palettes, " if package["palettes"] else ""
    return (
        f"{name}: {package['bytes'] / 1e6:.1f} MB, {bits}{sum(function['operations'].values())} "
        f"operations ({layout}), {package['seconds']:.0f} s"
    )


def check_space(output: Path, needed: int) -> None:
    """`UserError` unless the disks of `output` and of temporary files have `needed` bytes free."""
    folder = expanded(output).absolute()
    while not folder.exists():
        folder = folder.parent
    # coremltools writes a package to the temporary folder first.
    for place in {folder, Path(os.path.realpath(tempfile.gettempdir()))}:
        if (free := shutil.disk_usage(place).free) < needed:
            raise UserError(
                f"{place} has {free / 1e6:,.0f} MB free, the export takes {needed / 1e6:,.0f} MB: "
                "free some space" + ("" if place == folder else " or set TMPDIR to another disk")
            )
