"""The transformers of public teachers in diffusers' format: config and keys.

The networks here have the public names, so that the keys of public LoRAs match, and MLX's linear
layers have the public layout. So the tables only list names, except for MiniT2I's.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.module import shapes
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.json_values import check_positive, checked, whole_number
from mlx_snapgen.public.keymap import KeyMap, Row, fill, numberless, same
from mlx_snapgen.public.source import find_source
from mlx_snapgen.public_config import (
    Flux2TransformerConfig,
    MiniT2ITransformerConfig,
    QwenTransformerConfig,
    ZImageTransformerConfig,
)
from mlx_snapgen.reading import read_object
from mlx_snapgen.teachers.config import TRANSFORMERS
from mlx_snapgen.teachers.folder import NETWORKS, TeacherNetwork


def read_transformer(folder: Path) -> nn.Module:
    """The transformer in a folder in diffusers' format, lazily and in its stored type.

    Raises:
        UserError: another network, or a weight that is missing, unknown or misshapen.
    """
    path = folder / "config.json"
    kind, network = make_transformer(read_object(path), path)
    # Only safetensors; `convert.from_torch` reads pickles.
    public = find_source(str(folder)).weights(folder)
    fill(network, TRANSFORMER_KEYS[kind], public, where=folder)
    return network


def _keys(kind: str) -> KeyMap:
    """Every name of the network `kind`, in both directions."""
    network = NETWORKS[kind](TRANSFORMERS[kind](num_layers=1))
    return KeyMap(f"{kind} transformer", *map(same, numberless(shapes(network.parameters()))))


def _patches(value: mx.array) -> mx.array:
    """Kernel (out, in, p, p) of a convolution over patches -> matrix (out, p * p * in)."""
    return value.transpose(0, 2, 3, 1).reshape(len(value), -1) if value.ndim == 4 else value


def _minit2i_keys() -> KeyMap:
    """MiniT2I's: its projections of patches are convolutions, and some layers have no effect."""
    prefix, rows = "model.net.", _keys("minit2i").rows
    return KeyMap(
        "minit2i transformer",
        Row(f"{prefix}t_embedder|pooled_embedder.**", None),
        *(
            Row(prefix + str(row.ours), row.ours, *[_patches] * ("img_embedder" in str(row.ours)))
            for row in rows
        ),
    )


TRANSFORMER_KEYS = {kind: _keys(kind) for kind in NETWORKS if kind != "minit2i"}
"""By kind of teacher."""
TRANSFORMER_KEYS["minit2i"] = _minit2i_keys()


def make_transformer(values: dict[str, Any], path: Path) -> tuple[str, TeacherNetwork]:
    """Kind of teacher and our network with random weights, from diffusers' config.json.

    Args:
        path: of config.json, for messages.

    Raises:
        UserError: another network, or settings that are missing or unsupported.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in CONFIGS:
        raise UserError(
            f"{path}: expected one of {', '.join(CONFIGS)}, got {name}: give a model in "
            "diffusers' format"
        )
    kind, read = CONFIGS[name]
    try:
        with naming(path):
            check_positive(values)
            return kind, NETWORKS[kind](checked(read(values)))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} does not describe a known transformer: {error!r}") from None


def qwen_transformer_config(values: dict[str, Any]) -> QwenTransformerConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
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


def z_image_transformer_config(values: dict[str, Any]) -> ZImageTransformerConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    only = {"qk_norm": True, "siglip_feat_dim": None, "t_scale": 1000.0, "all_f_patch_size": [1]}
    only["n_kv_heads"] = values["n_heads"]
    for key, value in only.items():
        if values.get(key, value) != value:
            raise UserError(f"only {key} {value} is supported, got {values[key]}")
    if len(values["all_patch_size"]) != 1:
        raise UserError(f"only one patch size is supported, got {values['all_patch_size']}")
    return ZImageTransformerConfig(
        num_layers=values["n_layers"],
        num_refiner_layers=values["n_refiner_layers"],
        hidden_size=values["dim"],
        num_heads=values["n_heads"],
        latent_channels=values["in_channels"],
        patch_size=values["all_patch_size"][0],
        text_dims=values["cap_feat_dim"],
        time_dims=min(values["dim"], 256),
        norm_eps=values["norm_eps"],
        rope_axes=tuple(values["axes_dims"]),
        rope_theta=values["rope_theta"],
    )


def flux2_transformer_config(values: dict[str, Any]) -> Flux2TransformerConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    patch = 2  # of the autoencoder's latents: the pipeline makes patches, not diffusers' network
    channels, rest = divmod(values["in_channels"], patch**2)
    if rest:
        raise UserError(f"{values['in_channels']} channels do not make patches of 2x2 latents")
    only = {"patch_size": 1, "guidance_embeds": False, "eps": 1e-6}
    for key, value in only.items():
        if values.get(key, value) != value:
            raise UserError(f"only a FLUX.2 with {key} {value} is supported, got {values[key]}")
    if values.get("out_channels") not in (None, values["in_channels"]):
        raise UserError(
            f"{values['in_channels']} channels in and {values['out_channels']} out are not of one "
            "kind of latents"
        )
    return Flux2TransformerConfig(
        num_layers=values["num_layers"],
        num_single_layers=values["num_single_layers"],
        num_heads=values["num_attention_heads"],
        head_dim=values["attention_head_dim"],
        latent_channels=channels,
        patch_size=patch,
        text_dims=values["joint_attention_dim"],
        mlp_ratio=values["mlp_ratio"],
        frequency_dim=values["timestep_guidance_channels"],
        rope_axes=tuple(values["axes_dims_rope"]),
        rope_theta=values["rope_theta"],
    )


def minit2i_transformer_config(values: dict[str, Any]) -> MiniT2ITransformerConfig:
    """Our config from the model's config.json; `UserError` where the two networks differ."""
    heads, head_dim = (whole_number(values[key], key) for key in ("num_heads", "head_dim"))
    width = heads * head_dim
    only = {
        "in_channels": 3,
        "prediction": "x",
        "sampler": "euler",
        "cfg_channels": 3,
        "cfg_interval": [0.0, 1.0],
        "hidden_size": width,
        "txt_hidden_size": width,
    }
    for key, value in only.items():
        if values.get(key, value) != value:
            raise UserError(f"only a MiniT2I with {key} {value} is supported, got {values[key]}")
    return MiniT2ITransformerConfig(
        num_layers=values["depth_double"],
        num_text_layers=values["txt_preamble_depth"],
        num_heads=heads,
        head_dim=head_dim,
        patch_size=values["patch_size"],
        patch_dims=values["pca_channels"],
        # Rounded up to a multiple of 8.
        mlp_size=-(-int(width * values["mlp_ratio"]) // 8) * 8,
        text_dims=values["txt_input_size"],
        text_tokens=values["prompt_length"],
        image_size=values["image_size"],
    )


CONFIGS = {
    "MiniT2IMMJiTModel": ("minit2i", minit2i_transformer_config),
    "QwenImageTransformer2DModel": ("qwen-image", qwen_transformer_config),
    "ZImageTransformer2DModel": ("z-image", z_image_transformer_config),
    "Flux2Transformer2DModel": ("flux2", flux2_transformer_config),
}
"""diffusers' class -> kind of teacher, and the function that reads its config."""
