"""Write a model for PyTorch, at one width.

    python -m convert.to_torch my-model my-model-torch --width small

The folder gets config.json, transformer.safetensors, and of the default model's kinds also
decoder.safetensors and text_encoder_<n>.safetensors with its tokenizer. Read it with

    from convert.torch_dit import load
    model = load("my-model-torch")

and bring it back, trained further perhaps, with

    python -m convert.from_torch my-model-torch my-new-model --model my-model
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from convert.folders import check_new, new_folder
from convert.torch_folder import FORMAT, twin_files
from mlx_snapgen.config import WIDTH_NAMES, to_dict
from mlx_snapgen.errors import run_command
from mlx_snapgen.hub import find_model
from mlx_snapgen.pipeline import check_width
from mlx_snapgen.weights import Components, load_config, load_pretrained

Weights = dict[str, np.ndarray]

FOLDED = r"(patch_embed|downsample\.linear|[kv]_compress)\.weight$"
"""Linear layers over the pixels of a cell, which are strided convolutions."""
SHUFFLED = r"(^upsample\.linear|^head\.linear|^up[12]|^out)\.(weight|bias)$"
"""Layers whose outputs are the pixels of a cell: (cell, channel) here, (channel, cell) there."""


def torch_weights(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights of one of our modules as its PyTorch twin names and shapes them.

    Args:
        module: of one width.
        shapes: name -> shape of the twin's parameters.

    Raises:
        ValueError: the two are not the same network.
    """
    weights = {}
    for key, value in tree_flatten(module.parameters()):
        name = twin_name(key)
        value = np.array(value.astype(mx.float32))
        if name not in shapes:
            raise ValueError(f"the PyTorch network has no {name}")
        if re.search(FOLDED, name):
            out, channels, height, width = shapes[name]
            value = value.reshape(out, height, width, channels)
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        if re.search(SHUFFLED, name):
            cells = module.config.patch_size**2 if name.startswith("head") else 4
            value = value.reshape(cells, len(value) // cells, *value.shape[1:]).swapaxes(0, 1)
        weights[name] = np.ascontiguousarray(value.reshape(shapes[name]))
    if missing := shapes.keys() - weights.keys():
        raise ValueError(f"only the PyTorch network has {', '.join(sorted(missing))}")
    return weights


def twin_name(key: str) -> str:
    """PyTorch's name of a weight of one of our modules of one width."""
    return key.replace(".members.0.", ".")


def twins(components: Components) -> dict[str, nn.Module]:
    """The modules that have a PyTorch twin, by the name of the twin's file."""
    modules = {"transformer": components.transformer, "decoder": components.autoencoder.decoder}
    modules |= {f"text_encoder_{i}": m for i, m in enumerate(components.text_encoders)}
    return {name: modules[name] for name in twin_files(components.config)}


def torch_networks(components: Components, **kwargs: Any) -> dict[str, Any]:
    """The PyTorch twins of a model's networks, by the name of their file, with its weights.

    Args:
        components: their transformer has one width (`load_pretrained(model_width=...)`).
        kwargs: see `torch_dit.make_networks`.
    """
    # Not at the top, where a missing torch would be a traceback.
    import torch

    from convert.torch_dit import make_networks

    modules = twins(components)
    networks = make_networks(components.config, **kwargs)
    for name, network in networks.items():
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        weights = torch_weights(modules[name], shapes)
        network.load_state_dict({key: torch.from_numpy(v) for key, v in weights.items()})
        network.eval().requires_grad_(False)
    return networks


def to_torch(components: Components, output: Path, width: str) -> list[str]:
    """Write a model of one width.

    Args:
        components: their transformer has one width (`load_pretrained(model_width=...)`).
        output: folder to write; must not exist yet, or be empty.
        width: name of the width, for the record.

    Returns:
        What the model has besides, which has no PyTorch twin here.

    Raises:
        UserError: the folder holds something or cannot be written.
    """
    from safetensors.torch import save_file

    config = dataclasses.replace(components.config, quantization=None, few_step=None)
    values = {"format": FORMAT, "width": width} | to_dict(config)
    networks = torch_networks(components)
    with new_folder(output) as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        for name, network in networks.items():
            save_file(network.state_dict(), partial / f"{name}.safetensors")
        write_tokenizers(components, networks, partial)
    return without_twin(components, networks)


def write_tokenizers(components: Components, networks: Mapping[str, Any], folder: Path) -> None:
    """Put the tokenizer of each text encoder among `networks` into `folder`."""
    for i, encoder in enumerate(components.text_encoders):
        if f"text_encoder_{i}" in networks:
            (folder / f"tokenizer_{i}.model").write_bytes(encoder.tokenizer.model)


def without_twin(components: Components, networks: Mapping[str, Any]) -> list[str]:
    """The parts of a model that are not among `networks`."""
    encoders = (f"text_encoder_{i}" for i in range(len(components.text_encoders)))
    return [name for name in ("transformer", "decoder", *encoders) if name not in networks]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.to_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or repository of the model")
    parser.add_argument("output", type=Path, help="folder to write, not there yet")
    parser.add_argument("--width", choices=WIDTH_NAMES, default="full", help="default: full")
    args = parser.parse_args()
    import convert.torch_dit  # noqa: F401  before anything is loaded, if torch is missing

    check_new(args.output)
    folder = find_model(args.model)
    check_width(load_config(folder), args.width)
    components = load_pretrained(folder, dtype=mx.float32, model_width=WIDTH_NAMES[args.width])
    for name in to_torch(components, args.output, args.width):
        print(f"{name} is not written: take the public one")


if __name__ == "__main__":
    run_command(main)
