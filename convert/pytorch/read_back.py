"""Convert a folder of `convert.to_torch` back: the inverse of `convert.pytorch.weights`.

PyTorch has the transformer, the decoder of a convolutional autoencoder or of DC-AE, and the text
encoders of the kind "transformer", at one width. The other parts (the autoencoder's encoder, public
networks, tokenizers) are copied from the original model.
"""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from convert.pytorch.folder import FORMAT, read_config
from convert.pytorch.weights import FOLDED, SHUFFLED, twin_name, twins
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import Components, load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.module import Quantization, check_fit, shapes
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import new_folder
from mlx_snapgen.reading import read_object
from mlx_snapgen.settings import check_width, parse_width
from mlx_snapgen.tensor_files import load_tensors


def is_student(folder: Path) -> bool:
    """Whether `convert.to_torch` wrote the folder."""
    path = folder / "config.json"
    return path.is_file() and read_object(path).get("format") == FORMAT


def read_student(folder: Path, model: Path) -> Components:
    """The model of one width in `folder`, with the parts that PyTorch does not have from `model`.

    Raises:
        UserError: weights that are missing, damaged or do not fit; another model than `model`.
    """
    config, width = read_config(folder)
    check_width(load_config(model), width)
    components = load_pretrained(model, dtype=mx.float32, share=parse_width(width).share)
    if dataclasses.replace(components.config, quantization=None, few_step=None) != config:
        raise UserError(f"{folder} does not come from {model}: their configs differ")
    for name, module in twins(components).items():
        found = folder / f"{name}.safetensors"
        if not found.is_file():
            raise UserError(f"{folder} is incomplete: {found.name} is missing")
        weights = our_weights(module, load_tensors(found), found)
        module.update(tree_unflatten(list(weights.items())))
    return components


def our_weights(module: Any, public: Mapping[str, mx.array], path: Path) -> dict[str, Any]:
    """Weights of `module` from those of its PyTorch twin, the inverse of `torch_weights`.

    Args:
        path: of the twin's weights, for messages.

    Raises:
        UserError: weights of another network.
    """
    expected = {twin_name(key): shape for key, shape in shapes(module.parameters()).items()}
    # The twin has other shapes, with the same number of weights.
    found = {name: tuple(value.shape) for name, value in public.items()}
    for name in expected.keys() & found.keys():
        if math.prod(expected[name]) == math.prod(found[name]):
            found[name] = expected[name]
    check_fit(found, expected, path)
    weights = {}
    for key, shape in shapes(module.parameters()).items():
        name = twin_name(key)
        value = public[name]
        if re.search(SHUFFLED, name):
            cells = module.config.patch_size**2 if name.startswith("head") else 4
            value = value.reshape(len(value) // cells, cells, *value.shape[1:]).swapaxes(0, 1)
            value = value.reshape(-1, *value.shape[2:])
        if value.ndim == 4 and (len(shape) == 4 or re.search(FOLDED, name)):
            value = value.transpose(0, 2, 3, 1)
        weights[key] = mx.contiguous(value.reshape(shape).astype(mx.float32))
    return weights


def convert_student(
    folder: Path,
    model: Path,
    out: Path,
    *,
    dtype: mx.Dtype | None = None,
    quantization: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write the model in `folder` in our format, whole or not at all.

    Args:
        model: folder of the model that `convert.to_torch` read.
        quantization: {"bits", "group_size"} of the transformer; None does not quantize.

    Returns:
        The contents of report.json.

    Raises:
        UserError: as `read_student`; `out` is not empty.
    """
    components = read_student(folder, model)
    keys = [
        (f"{part}.{twin_name(key)}", f"{part}.{key}")
        for part, module in twins(components).items()
        for key, _ in tree_flatten(module.parameters())
    ]
    report = {
        "source": str(folder),
        "kind": "student",
        "dtype": None if dtype is None else str(dtype).removeprefix("mlx.core."),
        "quantization": quantization,
        "keys": {
            "used": [a for a, b in keys if a == b],
            "renamed": {a: b for a, b in keys if a != b},
            "ignored": {},
            "missing": [],
        },
    }
    how: Quantization | None = None if quantization is None else {"transformer": quantization}
    with new_folder(out) as made:
        texts = {"report.json": json.dumps(report, indent=1)}
        save_pretrained(made, components, quantize=how, dtype=dtype, texts=texts)
        for encoder in components.config.text_encoders:
            _copy_source(encoder, model, made)
    return report


def _copy_source(encoder: TextEncoderConfig, model: Path, made: Path) -> None:
    """Copy a text encoder's folder if it is inside that of the model."""
    if encoder.source is None or encoder.revision is not None:
        return
    inside = Path(encoder.source)
    if (model / inside).is_dir() and not inside.is_absolute() and ".." not in inside.parts:
        shutil.copytree(model / inside, made / inside, dirs_exist_ok=True)
