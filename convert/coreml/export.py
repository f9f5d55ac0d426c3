"""Export a model to Core ML packages: trace the PyTorch twins, quantize, write and check.

The order of the transformer's blocks is in convert/pytorch/efficient_dit.py (`steps`).
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mlx_snapgen
from convert.coreml.options import ExportSettings
from convert.coreml.package import Network, line, write_package
from convert.libraries import import_coremltools
from convert.pytorch.weights import torch_networks, without_twin, write_tokenizers
from mlx_snapgen._interrupts import interrupts_deferred
from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.files import check_new, new_folder
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.efficient_dit import count_parameters
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.quantize.palettes import LEAST, Palettes, check_palettes, with_palettes
from mlx_snapgen.quantize.sensitivity import choose_palettes
from mlx_snapgen.settings import parse_width


def of_width(components: Components, width: str) -> Components:
    """`components` with only the sub-network of this width in the transformer."""
    transformer = components.transformer
    if transformer.config.widths != (1.0,):
        transformer = extract(transformer, parse_width(width).share)
    config = dataclasses.replace(components.config, transformer=transformer.config)
    return dataclasses.replace(components, config=config, transformer=transformer)


def export_coreml(
    components: Components,
    output: Path,
    settings: ExportSettings,
    *,
    palettes: Palettes | None = None,
) -> dict[str, Any]:
    """Write a model's networks as Core ML packages.

    Args:
        components: of one width, or the supernetwork (see `load_fused`); `config.image_size`
            is the resolution, and `config.few_step` the sampler if that LoRA is merged.
        output: folder to write; must not exist, or be empty.
        palettes: those of the transformer, of `settings.quantize` bits; None chooses new ones.

    Returns:
        The contents of report.json.

    Raises:
        UserError: settings that contradict each other, weights that do not fit `palettes`, a
            missing library, or an output folder that is not empty or cannot be written.
    """
    settings.check()
    check_new(output)
    with announce("loading coremltools and PyTorch ..."), interrupts_deferred():
        ct = import_coremltools()
        import torch

        from convert.pytorch.tiles import share_weights

    kept = sorted(settings.widths, key=lambda name: parse_width(name).share, reverse=True)
    if len(kept) == 1:
        components = of_width(components, kept[0])
    if settings.quantize is not None:
        components, palettes = _with_palettes(components, settings, kept, palettes=palettes)
    models = {width: of_width(components, width) for width in kept}
    components = models[kept[0]]
    config = dataclasses.replace(components.config, quantization=None).of_one_size()
    networks, transformers = _twins(models)
    about = {
        "model": config.name,
        "widths": " ".join(settings.widths),
        "height": config.image_size[0],
        "image_width": config.image_size[1],
        "target": settings.target,
        "precision": settings.precision,
    }
    versions = {
        "mlx_snapgen": mlx_snapgen.__version__,
        "coremltools": ct.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    stored = palettes if settings.quantize is not None else None
    report: dict[str, Any] = about | {
        "not_exported": without_twin(components, networks),
        "versions": versions,
        "quantization": None if stored is None else stored.to_dict(),
    }
    layers = share_weights(list(transformers.values()))
    parts = _transformer_packages(
        {width: transformers[width] for width in settings.widths},
        _example_inputs(config)["Transformer"],
        chunks=settings.chunks,
        least=0 if stored is None else LEAST,
    )
    packages = parts | _other_packages(networks, config)
    report["packages"] = {}
    with new_folder(output) as partial:
        for name, functions in packages.items():
            print(f"{name}: converting ...", flush=True)
            found = write_package(
                partial / f"{name}.mlpackage",
                functions,
                target=settings.target,
                precision=settings.precision,
                about=about,
                description=f"{config.name or 'mlx_snapgen'}: {name}",
            )
            report["packages"][name] = found
            print(line(name, found), flush=True)
        if stored is not None:
            _check_stored([report["packages"][name] for name in parts], layers, bits=stored.bits)
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        (partial / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        write_tokenizers(components, networks, partial)
    return report


def _twins(models: Mapping[str, Components]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The PyTorch networks of the widest model, and the transformer of every width."""
    from convert.pytorch.attention import attend_split

    found = {width: torch_networks(model, attend=attend_split) for width, model in models.items()}
    return next(iter(found.values())), {w: made["transformer"] for w, made in found.items()}


def _transformer_packages(
    transformers: Mapping[str, Any], inputs: dict[str, Any], *, chunks: int, least: int
) -> dict[str, dict[str, Network]]:
    """Name of each package of the transformer -> its functions by width."""
    from convert.pytorch.chunks import cut, cut_points, example_values

    if chunks == 1:
        return {
            "Transformer": {
                width: Network(network, inputs, ("velocity",), least)
                for width, network in transformers.items()
            }
        }
    widest = max(transformers, key=lambda name: parse_width(name).share)
    ends = cut_points(transformers[widest], chunks)
    packages: dict[str, dict[str, Network]] = {f"Transformer_{i}": {} for i in range(chunks)}
    for width, network in transformers.items():
        parts = cut(network, ends)
        values = example_values(parts, inputs)
        for functions, part, value in zip(packages.values(), parts, values, strict=True):
            functions[width] = Network(part, value, part.outputs, least)
    return packages


def _other_packages(
    networks: Mapping[str, Any], config: ModelConfig
) -> dict[str, dict[str, Network]]:
    """Name of the package of each other network -> its only function."""
    from convert.pytorch.efficient_dit import ProjectedEncoder

    inputs = _example_inputs(config)
    packages = {}
    if "decoder" in networks:
        packages["Decoder"] = Network(networks["decoder"], inputs["Decoder"], ("picture",))
    for i, projection in enumerate(networks["transformer"].text):
        if (encoder := networks.get(f"text_encoder_{i}")) is not None:
            name = f"TextEncoder_{i}"
            projected = ProjectedEncoder(encoder, projection)
            packages[name] = Network(projected, inputs[name], ("text",))
    return {name: {"main": network} for name, network in packages.items()}


def _with_palettes(
    components: Components,
    settings: ExportSettings,
    widths: Sequence[str],
    *,
    palettes: Palettes | None,
) -> tuple[Components, Palettes]:
    """`components` with palettes in the transformer: `palettes`, which it has, or new ones."""
    network = components.transformer
    if palettes is None:
        assert settings.quantize is not None
        print("choosing palettes: drawing calibration prompts ...", flush=True)
        shares = {name: parse_width(name).share for name in widths}
        palettes = choose_palettes(
            components,
            settings.quantize,
            widths=shares if len(shares) > 1 else {widths[0]: 1.0},
            prompts=settings.prompts,
        )
        network = with_palettes(network, palettes.bits)
    check_palettes(network, palettes)
    return dataclasses.replace(components, transformer=network), palettes


def _check_stored(
    packages: Sequence[Mapping[str, Any]],
    layers: Mapping[str, Sequence[Any]],
    *,
    bits: Mapping[str, int],
) -> None:
    """Assert that coremltools stored these palettes, and no others.

    Args:
        layers: see `convert.pytorch.tiles.Layers`.
    """
    tiles = [(conv, bits[path]) for path in bits for conv in layers[path]]
    sizes = [(conv.weight.numel(), n) for conv, n in tiles if conv.weight.numel() >= LEAST]
    found = sum(package["palettized_weights"] for package in packages)
    assert found == len(sizes), f"{len(sizes)} weights have palettes, the packages hold {found}"
    if len(packages) == 1:
        average = sum(size * n for size, n in sizes) / sum(size for size, _ in sizes)
        stored = packages[0]["bits_per_index"]
        # A layer with few distinct values needs fewer bits.
        assert average - 0.1 < stored < average + 0.001, f"{stored} bits on average, not {average}"


def _example_inputs(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Example inputs of each package, by name."""
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


def needed_bytes(config: ModelConfig, settings: ExportSettings) -> int:
    """Approximate disk space of an export while it is written."""
    shares = [parse_width(width).share for width in settings.widths]
    counts = [count_parameters(config.transformer.standalone(share)) for share in shares]
    # Each network is written twice; several widths are joined in a third package.
    copies = 2 * sum(counts) + (max(counts) if len(counts) > 1 else 0)
    return copies * (2 if settings.precision == "float16" else 4)
