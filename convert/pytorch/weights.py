"""Weights of the MLX networks, with the names and layouts of their PyTorch twins."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from convert.pytorch.folder import FORMAT, twin_files
from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.files import new_folder
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.public.stream import Entry, write_new

Weights = dict[str, Callable[[], np.ndarray]]
"""Functions that make one weight each, so that no second copy of a network is in memory."""


FOLDED = r"(patch_embed|downsample\.linear|[kv]_compress)\.weight$"
"""Linear layers over the pixels of a cell, in PyTorch strided convolutions."""


SHUFFLED = r"(^upsample\.linear|^head\.linear|^up\d|^out)\.(weight|bias)$"
"""Layers whose outputs are the pixels of a cell: (cell, channel) in MLX, (channel, cell) here."""


def torch_weights(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights of an MLX module, with names and shapes of its PyTorch twin.

    Args:
        module: of one width.
        shapes: name -> shape of the twin's parameters.

    Raises:
        ValueError: weights of another network.
    """
    values = {
        twin_name(key): value for key, value in dict(tree_flatten(module.parameters())).items()
    }
    if unknown := values.keys() - shapes.keys():
        raise ValueError(f"the PyTorch network has no {', '.join(sorted(unknown))}")
    if missing := shapes.keys() - values.keys():
        raise ValueError(f"only the PyTorch network has {', '.join(sorted(missing))}")
    return {
        name: partial(_torch_weight, module, name, value, shapes[name])
        for name, value in values.items()
    }


def _torch_weight(module: Any, name: str, array: mx.array, shape: tuple[int, ...]) -> np.ndarray:
    value = np.array(array.astype(mx.float32))
    if re.search(FOLDED, name):
        out, channels, height, width = shape
        value = value.reshape(out, height, width, channels)
    if value.ndim == 4:
        value = value.transpose(0, 3, 1, 2)
    if re.search(SHUFFLED, name):
        cells = module.config.patch_size**2 if name.startswith("head") else 4
        value = value.reshape(cells, len(value) // cells, *value.shape[1:]).swapaxes(0, 1)
    return np.ascontiguousarray(value.reshape(shape))


def twin_name(key: str) -> str:
    """Name in PyTorch of a weight of an MLX module of one width."""
    return key.replace(".members.0.", ".")


def twins(components: Components) -> dict[str, nn.Module]:
    """The modules that have a PyTorch twin, by the name of the twin's file."""
    modules = {"transformer": components.transformer, "decoder": components.autoencoder.decoder}
    modules |= {f"text_encoder_{i}": m for i, m in enumerate(components.text_encoders)}
    return {name: modules[name] for name in twin_files(components.config)}


def torch_networks(components: Components, **kwargs: Any) -> dict[str, Any]:
    """The PyTorch twins of a model's networks, by the name of their file, with its weights.

    Args:
        components: their transformer has one width (`load_pretrained(share=...)`).
        kwargs: of `efficient_dit.make_networks`.
    """
    # Imported here: commands import this module before they check that torch is installed.
    import torch

    from convert.pytorch.efficient_dit import make_networks

    modules = twins(components)
    networks = make_networks(components.config, **kwargs)
    for name, network in networks.items():
        network.eval().requires_grad_(False)
        state = network.state_dict()
        for key, make in torch_weights(modules[name], _shapes(network)).items():
            state[key].copy_(torch.from_numpy(make()))
    return networks


def _shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def to_torch(components: Components, output: Path, *, width: str) -> list[str]:
    """Write a model of one width.

    Args:
        components: their transformer has one width (`load_pretrained(share=...)`).
        output: folder to write; must not exist, or be empty.
        width: name of the width, for config.json.

    Returns:
        Names of the model's parts that have no PyTorch twin.

    Raises:
        UserError: the folder is not empty or cannot be written.
    """
    import torch

    from convert.pytorch.efficient_dit import make_networks

    config = dataclasses.replace(components.config, quantization=None, few_step=None)
    values = {"format": FORMAT, "width": width} | to_dict(config)
    modules = twins(components)
    with torch.device("meta"):  # only names and shapes are needed
        networks = make_networks(components.config)
    with new_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        for name, network in networks.items():
            shapes = _shapes(network)
            entries = [
                Entry({key: (mx.float32, shapes[key])}, partial(_tensor, key, make))
                for key, make in torch_weights(modules[name], shapes).items()
            ]
            write_new(folder / f"{name}.safetensors", entries, metadata={"format": "pt"})
        write_tokenizers(components, networks, folder)
    return without_twin(components, networks)


def _tensor(name: str, make: Callable[[], np.ndarray]) -> tuple[dict[str, mx.array], None]:
    return {name: mx.array(make())}, None


def write_tokenizers(components: Components, networks: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizers of the text encoders among `networks`."""
    for i, encoder in enumerate(components.text_encoders):
        if f"text_encoder_{i}" in networks:
            (folder / f"tokenizer_{i}.model").write_bytes(encoder.tokenizer.model)


def without_twin(components: Components, networks: Mapping[str, Any]) -> list[str]:
    """The parts of a model that are not among `networks`."""
    encoders = (f"text_encoder_{i}" for i in range(len(components.text_encoders)))
    return [name for name in ("transformer", "decoder", *encoders) if name not in networks]
