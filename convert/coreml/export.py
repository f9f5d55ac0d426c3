"""A model to Core ML packages: traced from the PyTorch twin, quantized, written and checked."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx_snapgen

# isort: split
import mlx.core as mx
import numpy as np

from convert.coreml.options import (
    check_options,
)
from convert.coreml.package import Network, coremltools, line, write_package
from convert.pytorch.weights import torch_networks, without_twin, write_tokenizers
from mlx_snapgen.checkpoint.model import Components, fuse_few_step, load_pretrained
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.config import ModelConfig, to_dict
from mlx_snapgen.files import new_folder
from mlx_snapgen.networks.efficient_dit import count_parameters
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.quantize.palettes import (
    LEAST,
    Palettes,
    check_palettes,
    with_palettes,
)
from mlx_snapgen.quantize.sensitivity import choose_palettes
from mlx_snapgen.settings import parse_width


def load_for_export(
    folder: Path, widths: Sequence[str] = ("full",), few_step: bool = True
) -> Components:
    """A model in float32 with the sub-network of one width, or the supernetwork for several.

    Args:
        few_step: fuse the few-step LoRA, if the model has one; `config.few_step` is None otherwise.
    """
    width = parse_width(widths[0]).share if len(widths) == 1 else None
    components = load_pretrained(folder, dtype=mx.float32, share=width, few_step=few_step)
    fuse_few_step(components)
    return components


def of_width(components: Components, width: str) -> Components:
    """`components` with the transformer's sub-network of this width alone."""
    transformer = components.transformer
    if transformer.config.widths != (1.0,):
        transformer = extract(transformer, parse_width(width).share)
    config = dataclasses.replace(components.config, transformer=transformer.config)
    return dataclasses.replace(components, config=config, transformer=transformer)


def export_coreml(
    components: Components,
    output: Path,
    widths: Sequence[str] = ("full",),
    target: str = "ios17",
    precision: str = "float16",
    quantize: float | None = None,
    chunks: int = 1,
    prompts: Sequence[str] | None = None,
    palettes: Palettes | None = None,
) -> dict[str, Any]:
    """Write a model's networks as Core ML packages.

    Args:
        components: of one width, or the supernetwork (see `load_for_export`); `config.image_size`
            is the resolution, and `config.few_step` says how to sample if that LoRA is fused.
        output: folder to write; must not exist yet, or be empty.
        widths: name of the width, for the record; several make functions of these names of the
            transformer, in this order, the first its default.
        target: oldest system that runs it, one of `TARGETS`.
        precision: one of `PRECISIONS`, of weights and arithmetic; the angles of the timestep stay
            float32.
        quantize: bits of the transformer's weights on average, 4 to 8 (see `Palettes`); None leaves
            them. The other networks, a small part of a model, stay as they are.
        chunks: packages to cut the transformer into.
        prompts: what to calibrate palettes on; None takes some that the model knows.
        palettes: those that the transformer has already, of `quantize` bits; None finds them.

    Returns:
        What report.json holds.

    Raises:
        UserError: options that do not go together, weights that are not of `palettes`, a library
            that is missing, or a folder that holds something or cannot be written.
    """
    check_options(widths, target, precision, quantize)
    ct = coremltools()
    import torch

    from convert.pytorch.attention import attend_split
    from convert.pytorch.chunks import cut, cut_points, example_values
    from convert.pytorch.tiles import share_weights

    kept = sorted(widths, key=lambda name: parse_width(name).share, reverse=True)
    if len(kept) == 1:
        components = of_width(components, kept[0])
    if quantize is not None:
        components, palettes = _with_palettes(components, quantize, kept, prompts, palettes)
    models = {width: of_width(components, width) for width in kept}
    components = models[kept[0]]
    config = dataclasses.replace(components.config, quantization=None)
    networks = torch_networks(components, attend=attend_split)
    missing = without_twin(components, networks)
    transformers = {kept[0]: networks["transformer"]} | {
        width: torch_networks(models[width], attend=attend_split)["transformer"]
        for width in kept[1:]
    }
    about = {
        "model": config.name,
        "widths": " ".join(widths),
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
    quantization = palettes.to_dict() if quantize is not None else None
    report = about | {"not_exported": missing, "versions": versions, "quantization": quantization}
    layers = share_weights(list(transformers.values()))
    least = 0 if quantize is None else LEAST

    inputs = _example_inputs(config)
    ends = cut_points(transformers[kept[0]], chunks)
    functions: list[dict[str, Network]] = [{} for _ in ends]
    for width in widths:
        parts = cut(transformers[width], ends)
        if chunks == 1:
            functions[0][width] = Network(
                transformers[width], inputs["Transformer"], ("velocity",), least
            )
            continue
        for function, part, values in zip(
            functions, parts, example_values(parts, inputs["Transformer"]), strict=True
        ):
            function[width] = Network(part, values, part.outputs, least)
    names = ["Transformer"] if chunks == 1 else [f"Transformer_{i}" for i in range(chunks)]
    packages = dict(zip(names, functions, strict=True))
    if "decoder" in networks:
        packages["Decoder"] = {
            "main": Network(networks["decoder"], inputs["Decoder"], ("picture",))
        }
    for name, encoder in _encoders(networks).items():
        packages[name] = {"main": Network(encoder, inputs[name], ("text",))}

    report["packages"] = {}
    with new_folder(output) as partial:
        for name, functions_of in packages.items():
            path = partial / f"{name}.mlpackage"
            described = f"{config.name or 'mlx_snapgen'}: {name}"
            found = write_package(path, functions_of, target, precision, about, described)
            report["packages"][name] = found
            print(line(name, found), flush=True)
        if quantize is not None:
            _check_stored([report["packages"][name] for name in names], layers, palettes.bits)
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        (partial / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        write_tokenizers(components, networks, partial)
    return report


def _with_palettes(
    components: Components,
    average: float,
    widths: Sequence[str],
    prompts: Sequence[str] | None,
    palettes: Palettes | None,
) -> tuple[Components, Palettes]:
    """`components` with palettes in the transformer: those that it has, or else new ones."""
    network = components.transformer
    if palettes is None:
        several = {name: parse_width(name).share for name in widths}
        shares = several if len(widths) > 1 else {widths[0]: 1.0}
        palettes = choose_palettes(components, average, widths=shares, prompts=prompts)
        network = with_palettes(network, palettes.bits)
    check_palettes(network, palettes)
    return dataclasses.replace(components, transformer=network), palettes


def _check_stored(
    packages: Sequence[Mapping[str, Any]],
    layers: Mapping[str, Sequence[Any]],
    bits: Mapping[str, int],
) -> None:
    """An assertion that coremltools stored these palettes, and no others.

    Args:
        layers: see `torch_tiles.Layers`.
    """
    tiles = [(conv, bits[path]) for path in bits for conv in layers[path]]
    sizes = [(conv.weight.numel(), n) for conv, n in tiles if conv.weight.numel() >= LEAST]
    found = sum(package["palettized_weights"] for package in packages)
    assert found == len(sizes), f"{len(sizes)} weights have palettes, the packages hold {found}"
    if len(packages) == 1:
        average = sum(size * n for size, n in sizes) / sum(size for size, _ in sizes)
        stored = packages[0]["bits_per_index"]
        # A layer of few different numbers takes fewer bits.
        assert average - 0.1 < stored < average + 0.001, f"{stored} bits on average, not {average}"


def _encoders(networks: Mapping[str, Any]) -> dict[str, Any]:
    """Name of the package -> text encoder with its projection."""
    from convert.pytorch.efficient_dit import ProjectedEncoder

    projections = networks["transformer"].text
    return {
        f"TextEncoder_{i}": ProjectedEncoder(networks[f"text_encoder_{i}"], projection)
        for i, projection in enumerate(projections)
        if f"text_encoder_{i}" in networks
    }


def _example_inputs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Tensors of the shapes that each package takes, by name."""
    import torch

    side = config.autoencoder.downsampling
    latents = (1, config.transformer.latent_channels, *(n // side for n in config.image_size))
    lengths = [encoder.max_length for encoder in config.text_encoders]
    inputs = {
        "Transformer": {
            "x_t": torch.randn(latents),
            "t": torch.full((1,), 0.5),
            "text": torch.randn(1, config.transformer.text_width, 1, sum(lengths)),
            "mask": torch.ones(1, sum(lengths)),
        },
        "Decoder": {"latents": torch.randn(latents)},
    }
    for i, length in enumerate(lengths):
        tokens = torch.zeros(1, length, dtype=torch.int32)
        inputs[f"TextEncoder_{i}"] = {"tokens": tokens, "mask": torch.ones(1, length)}
    return inputs


def needed_bytes(config: ModelConfig, widths: Sequence[str], precision: str) -> int:
    """Disk space that an export takes while it is written, roughly."""
    counts = [count_parameters(config.transformer.standalone(parse_width(w).share)) for w in widths]
    # Each is written twice, and several widths are put together in a third package.
    copies = 2 * sum(counts) + (max(counts) if len(widths) > 1 else 0)
    return copies * (2 if precision == "float16" else 4)
