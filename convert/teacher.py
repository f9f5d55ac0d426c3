"""Public flow models as teachers: diffusers' folders to the networks of `mlx_snapgen.teachers`."""

import json
from pathlib import Path
from typing import Any

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.errors import UserError
from mlx_snapgen.teachers.config import QwenTransformerConfig
from mlx_snapgen.teachers.qwen_transformer import QwenTransformer

Weights = dict[str, mx.array]


def read_transformer(folder: Path) -> nn.Module:
    """The transformer in a folder of diffusers, lazily and in the type it is stored in.

    Raises:
        UserError: another network, or a key that is missing, unknown or misshapen.
    """
    network = make_transformer(folder)
    weights: Weights = {}
    for path in weight_files(folder):
        weights |= transformer_weights(read_weights(path))
    try:
        network.load_weights(list(weights.items()))
    except ValueError as error:
        raise UserError(f"{folder} is another network: {' '.join(str(error).split())}") from None
    return network


def make_transformer(folder: Path) -> nn.Module:
    """The network that the folder's config.json describes, with random weights."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return QwenTransformer(qwen_transformer_config(values))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe a transformer known here: {error!r}") from None


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder of diffusers, whole or in shards, in order."""
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no diffusion_pytorch_model*.safetensors")
    return files


def read_weights(path: Path) -> Weights:
    """The tensors of one file, lazily; `UserError` when it is damaged."""
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None


def transformer_weights(public: Weights) -> Weights:
    """diffusers' keys to ours, for all of a checkpoint or one shard.

    The networks here keep the public names, by which public LoRAs find their layers, and MLX's
    linear layers the public layout: what is left of the mapping is the identity. A key that is not
    known is kept too, so that strict loading finds it.
    """
    return dict(public)


def qwen_transformer_config(values: dict[str, Any]) -> QwenTransformerConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    if values.get("_class_name") != "QwenImageTransformer2DModel":
        raise UserError(
            f"expected a QwenImageTransformer2DModel, got {values.get('_class_name')}: give the "
            "folder `transformer` of a model in diffusers' format"
        )
    flags = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    for key in flags:
        if values.get(key):
            raise UserError(f"this is a variant of Qwen-Image with {key}, which is not supported")
    patch = values["patch_size"]
    channels, rest = divmod(values["in_channels"], patch**2)
    if rest or values["out_channels"] not in (None, channels):
        raise UserError(
            f"{values['in_channels']} channels in and {values['out_channels']} out do not make "
            f"latents of one kind in patches of {patch}x{patch}"
        )
    return QwenTransformerConfig(
        num_layers=values["num_layers"],
        num_heads=values["num_attention_heads"],
        head_dim=values["attention_head_dim"],
        latent_channels=channels,
        patch_size=patch,
        text_dims=values["joint_attention_dim"],
        rope_axes=tuple(values["axes_dims_rope"]),
    )
