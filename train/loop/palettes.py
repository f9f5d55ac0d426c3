"""Load a model that gets palettes, and write a model that has them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlx_snapgen.checkpoint.model import Components, load_fused, save_pretrained
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.quantize.palettes import Palettes, check_palettes, palettes_file
from mlx_snapgen.reading import read_text


def load_alone(folder: Path, widths: Sequence[str], *, name: str | None = None) -> Components:
    """A model in float32, with its few-step LoRA merged if it has one.

    Args:
        widths: names; a single one loads only that sub-network.
        name: the model's for messages; None for the one in its config.
    """
    components = load_fused(folder, widths, name=name)
    config = dataclasses.replace(
        components.config, sampler=components.config.sampler_for(), few_step=None
    )
    return dataclasses.replace(components, config=config)


def save(
    output: Path, components: Components, network: EfficientDiT, *, palettes: Palettes, model: Path
) -> None:
    """Write the model with `network` as its transformer, and the license of the folder `model`."""
    check_palettes(network, palettes)
    texts = palettes_file(palettes)
    if (license := model / "LICENSE").is_file():
        texts["LICENSE"] = read_text(license)
    save_pretrained(output, dataclasses.replace(components, transformer=network), texts=texts)
