"""Export a model to Core ML, at one width and one resolution.

    python -m convert.coreml my-model my-model-coreml --width small --resolution 512

The folder gets Transformer.mlpackage, of the default model's kinds also Decoder.mlpackage and
TextEncoder.mlpackage with its tokenizer, the config.json of this width and resolution, and
report.json, which tells what is in the packages. Inputs and outputs, all for one picture:

    TextEncoder  tokens (1, L) int32, mask (1, L)       -> text (1, D, 1, L)
    Transformer  latents (1, C, h, w), timestep (1),
                 text (1, D, 1, L), mask (1, L)         -> velocity (1, C, h, w)
    Decoder      latents (1, C, h, w)                   -> picture (1, 3, 8h, 8w)

A mask is 1 where a token counts. A model with several text encoders gets TextEncoder_0 and so on;
their texts and masks are joined along L in this order. The timestep is the noise level in [0, 1],
and a picture is in [-1, 1], unclipped. A few-step LoRA is not in the packages.
"""

import argparse
import dataclasses
import json
import logging
import platform
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx_snapgen

# isort: split
import mlx.core as mx
import numpy as np

from convert.folders import check_new, new_folder
from convert.mil_interpreter import summary
from convert.to_torch import torch_networks, without_twin, write_tokenizers
from mlx_snapgen.config import WIDTH_NAMES, to_dict
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.hub import find_model
from mlx_snapgen.pipeline import check_size, check_width
from mlx_snapgen.weights import FORMAT_VERSION, Components, load_config, load_pretrained

TARGETS = ("ios17", "ios18")
PRECISIONS = ("float16", "float32")


def coremltools() -> Any:
    """The library; `UserError` when it is missing or meets a numpy that breaks it."""
    try:
        logging.getLogger("coremltools").setLevel(logging.ERROR)
        import coremltools
    except ImportError as error:
        raise UserError(f"this needs coremltools ({error}): pip install '.[coreml]'") from None
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        # Its shape arithmetic fails there: apple/coremltools#2633.
        raise UserError(
            f"coremltools {coremltools.__version__} does not work with numpy {np.__version__}: "
            "pip install 'numpy<2.4'"
        )
    return coremltools


def export_coreml(
    components: Components,
    output: Path,
    width: str,
    target: str = "ios17",
    precision: str = "float16",
) -> dict[str, Any]:
    """Write a model's networks as Core ML packages.

    Args:
        components: of one width; `config.image_size` is the resolution.
        output: folder to write; must not exist yet, or be empty.
        width: name of the width, for the record.
        target: oldest system that runs it, one of `TARGETS`.
        precision: one of `PRECISIONS`, of weights and arithmetic; the angles of the timestep stay
            float32.

    Returns:
        What report.json holds.

    Raises:
        UserError: a library is missing, or the folder holds something or cannot be written.
    """
    ct = coremltools()
    import torch

    from convert.torch_attention import attend_split
    from convert.torch_dit import ProjectedEncoder

    networks = torch_networks(components, attend=attend_split)
    missing = without_twin(components, networks)
    config = dataclasses.replace(components.config, quantization=None, few_step=None)
    side = config.autoencoder.downsampling
    latents = (1, config.transformer.latent_channels, *(n // side for n in config.image_size))
    length = sum(encoder.max_length for encoder in config.text_encoders)
    text = (1, config.transformer.text_width, 1, length)
    traced = {
        "Transformer": (
            networks["transformer"],
            {
                "latents": torch.randn(latents),
                "timestep": torch.full((1,), 0.5),
                "text": torch.randn(text),
                "mask": torch.ones(1, length),
            },
            "velocity",
        )
    }
    if "decoder" in networks:
        traced["Decoder"] = networks["decoder"], {"latents": torch.randn(latents)}, "picture"
    several = len(config.text_encoders) > 1
    for i, encoder in enumerate(config.text_encoders):
        if f"text_encoder_{i}" in networks:
            tokens = torch.zeros(1, encoder.max_length, dtype=torch.int32)
            traced[f"TextEncoder_{i}" if several else "TextEncoder"] = (
                ProjectedEncoder(networks[f"text_encoder_{i}"], networks["transformer"].text[i]),
                {"tokens": tokens, "mask": torch.ones(1, encoder.max_length)},
                "text",
            )
    about = {
        "model": config.name,
        "width": width,
        "height": config.image_size[0],
        "image_width": config.image_size[1],
        "target": target,
        "precision": precision,
    }
    versions = {
        "mlx_snapgen": mlx_snapgen.__version__,
        "coremltools": ct.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    report = about | {"not_exported": missing, "versions": versions, "packages": {}}
    with new_folder(output) as partial:
        for name, (network, inputs, result) in traced.items():
            start = time.perf_counter()
            package = convert(ct, network, inputs, result, target, precision)
            package.short_description = f"{config.name or 'mlx_snapgen'}: {name}"
            package.user_defined_metadata.update({k: str(v) for k, v in about.items()})
            path = partial / f"{name}.mlpackage"
            package.save(str(path))
            report["packages"][name] = _described(path, network, time.perf_counter() - start)
            print(_line(name, report["packages"][name]), flush=True)
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        (partial / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        write_tokenizers(components, networks, partial)
    return report


def convert(
    ct: Any, network: Any, inputs: Mapping[str, Any], result: str, target: str, precision: str
) -> Any:
    """A torch module as an MLModel of one output, traced on `inputs`."""
    import torch

    half = precision == "float16"
    floating = np.float16 if half else np.float32

    def described(name: str, value: Any) -> Any:
        if not value.is_floating_point():
            return ct.TensorType(name=name, shape=value.shape, dtype=np.int32)
        return ct.TensorType(
            name=name, shape=value.shape, dtype=np.float32 if name == "timestep" else floating
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, tuple(inputs.values()), check_trace=False)
        return ct.convert(
            traced,
            convert_to="mlprogram",
            inputs=[described(name, value) for name, value in inputs.items()],
            outputs=[ct.TensorType(name=result, dtype=floating)],
            minimum_deployment_target=getattr(ct.target, target.replace("ios", "iOS")),
            compute_precision=(
                ct.transform.FP16ComputePrecision(op_selector=_not_an_angle)
                if half
                else ct.precision.FLOAT32
            ),
            skip_model_load=True,
        )


def _not_an_angle(operation: Any) -> bool:
    """Whether an operation may be fp16: angles go up to 1000, where fp16 has steps of a half."""
    if operation.op_type in ("sin", "cos"):
        return False
    if operation.op_type not in ("mul", "reshape", "expand_dims", "cast"):
        return True
    return all(_not_an_angle(child) for value in operation.outputs for child in value.child_ops)


def _described(path: Path, network: Any, seconds: float) -> dict[str, Any]:
    for file in path.rglob("*"):
        # coremltools leaves the program readable for its writer alone.
        file.chmod(file.stat().st_mode | 0o044 | (0o011 if file.is_dir() else 0))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    parameters = sum(p.numel() for p in network.parameters())
    values = {"parameters": parameters, "bytes": size, "seconds": round(seconds, 1)}
    return values | summary(path)


def _line(name: str, package: dict[str, Any]) -> str:
    function = package["functions"]["main"]
    layout = ", ".join(f"{n} {kind}s" for kind, n in function["layout_operations"].items())
    return (
        f"{name}: {package['bytes'] / 1e6:.1f} MB, {sum(function['operations'].values())} "
        f"operations ({layout}), {package['seconds']:.0f} s"
    )


def parse_resolution(text: str) -> tuple[int, int]:
    """Pixels of "512" or "512x768" (height x width); `UserError` for anything else."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise UserError(f"a resolution is 512 or 512x768 (height x width), not '{text}'")
    return int(match[1]), int(match[2] or match[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.coreml",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or repository of the model")
    parser.add_argument("output", type=Path, help="folder to write, not there yet")
    parser.add_argument("--width", choices=WIDTH_NAMES, default="full", help="default: full")
    parser.add_argument(
        "--resolution", metavar="N", help="pixels, 512 or 512x768; default: its own"
    )
    parser.add_argument("--target", choices=TARGETS, default="ios17", help="default: ios17")
    parser.add_argument("--precision", choices=PRECISIONS, default="float16")
    args = parser.parse_args()
    coremltools()  # fails before anything is loaded
    check_new(args.output)
    folder = find_model(args.model)
    config = load_config(folder)
    check_width(config, args.width)
    size = parse_resolution(args.resolution) if args.resolution else config.image_size
    check_size(config, *size)
    components = load_pretrained(folder, dtype=mx.float32, model_width=WIDTH_NAMES[args.width])
    components.config = dataclasses.replace(components.config, image_size=size)
    report = export_coreml(components, args.output, args.width, args.target, args.precision)
    for name in report["not_exported"]:
        print(f"{name} is not exported: take a public export of it")


if __name__ == "__main__":
    run_command(main)
