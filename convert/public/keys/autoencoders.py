"""Public autoencoders: Qwen-Image's, Flux's (kl) and TAEHV."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.model import load_autoencoder
from mlx_snapgen.checkpoint.module import read_part
from mlx_snapgen.config import TAEW2_1, AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.kl import NUM_GROUPS
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.autoencoders.taehv import TinyAutoencoder

Weights = dict[str, mx.array]


def read_autoencoder(source: Path) -> Autoencoder:
    """The autoencoder in `source`, float32: one converted, or public; a file is of TAEHV's family.

    Raises:
        UserError: another network, or a key that is missing, unknown or misshapen.
    """
    if read_part(source, "autoencoder") is not None:
        return load_autoencoder(source)
    if not source.is_dir():
        return read_taehv(source)
    path = source / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("_class_name") == "AutoencoderKL":
            config, weights = kl_config(values), kl_weights
        else:
            config, weights = qwen_image_config(values), qwen_image_weights
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe an autoencoder: {error!r}") from None
    path = source / "diffusion_pytorch_model.safetensors"
    return _filled(make_autoencoder(config), weights(_read(path)), path)


def qwen_image_config(values: dict[str, Any]) -> AutoencoderConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    if values.get("_class_name") != "AutoencoderKLQwenImage":
        raise UserError(f"expected an AutoencoderKLQwenImage, got {values.get('_class_name')}")
    for key, only in (("attn_scales", []), ("input_channels", 3)):
        if values.get(key, only) != only:
            raise UserError(f"only {key} {only} is supported, got {values[key]}")
    if values["dim_mult"][0] != 1:
        raise UserError(f"only a dim_mult that starts with 1 is supported: {values['dim_mult']}")
    channels = tuple(values["base_dim"] * m for m in values["dim_mult"])
    count = values["num_res_blocks"]
    return AutoencoderConfig(
        kind="qwen-image",
        latent_channels=values["z_dim"],
        encoder_channels=channels,
        decoder_channels=channels[::-1],
        encoder_blocks=(count,) * len(channels),
        decoder_blocks=(count + 1,) * len(channels),
        latents_mean=tuple(values["latents_mean"]),
        latents_std=tuple(values["latents_std"]),
    )


_QWEN_IMAGE = (
    r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid_block|down_blocks|up_blocks)\..+"
    r"|(post_)?quant_conv\.(weight|bias)"
)


def qwen_image_name(key: str) -> str | None:
    """Our name of diffusers' key, None for `time_conv`, which only changes the frame rate.

    Raises:
        UserError: a key of another network.
    """
    if re.search(r"\.(down_blocks\.\d+|upsamplers\.0)\.time_conv\.(weight|bias)$", key):
        return None
    if not re.fullmatch(_QWEN_IMAGE, key):
        raise UserError(f"another network than AutoencoderKLQwenImage: it has '{key}'")
    name = key.replace(".resample.1.", ".conv.")
    name = re.sub(r"^quant_conv", "encoder.quant_conv", name)
    name = re.sub(r"^post_quant_conv", "decoder.post_quant_conv", name)
    return re.sub(r"\.gamma$", ".weight", name)


def qwen_image_weights(public: Weights) -> Weights:
    """diffusers' keys and layout to ours.

    3-D kernels (O, I, T, H, W) keep their last temporal slice, which is all that a single frame
    meets.
    """
    weights = {}
    for key, value in public.items():
        name = qwen_image_name(key)
        if name is None:
            continue
        if key.endswith(".gamma"):
            value = value.reshape(-1)
        if value.ndim == 5:
            value = value[:, :, -1]
        weights[name] = _kernel(value)
    return weights


def kl_config(values: dict[str, Any]) -> AutoencoderConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    only = {
        "norm_num_groups": NUM_GROUPS,
        "act_fn": "silu",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
        "in_channels": 3,
        "latents_mean": None,
        "latents_std": None,
    }
    for key, value in only.items():
        if values.get(key, value) != value:
            raise UserError(f"only an AutoencoderKL with {key} {value} is supported")
    channels, count = tuple(values["block_out_channels"]), values["layers_per_block"]
    latents = values["latent_channels"]
    return AutoencoderConfig(
        kind="kl",
        latent_channels=latents,
        encoder_channels=channels,
        decoder_channels=channels[::-1],
        encoder_blocks=(count,) * len(channels),
        decoder_blocks=(count + 1,) * len(channels),
        latents_mean=(values["shift_factor"] or 0.0,) * latents,
        latents_std=(1 / values["scaling_factor"],) * latents,
    )


_KL = (
    r"(encoder|decoder)\.((conv_in|conv_out|conv_norm_out)\.(weight|bias)"
    r"|mid_block\.attentions\.0\.(group_norm|to_[qkv]|to_out\.0)\.(weight|bias)"
    r"|(mid_block|(down|up)_blocks\.\d+)\.resnets\.\d+\.(norm[12]|conv[12]|conv_shortcut)"
    r"\.(weight|bias)"
    r"|(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias))"
)


def kl_name(key: str) -> str:
    """Our name of diffusers' key; those of q, k and v say which rows of `to_qkv` they become.

    Raises:
        UserError: a key of another network.
    """
    if not re.fullmatch(_KL, key):
        raise UserError(f"another network than AutoencoderKL: it has '{key}'")
    name = key.replace("attentions.0.group_norm.", "attentions.0.norm.")
    name = name.replace("attentions.0.to_out.0.", "attentions.0.proj.")
    return re.sub(r"to_([qkv])\.(weight|bias)$", r"to_qkv.\2 (\1)", name)


def kl_weights(public: Weights) -> Weights:
    """diffusers' keys and layout to ours: q, k and v of the attention become one matrix.

    One without the other two is kept under its own name, so that strict loading finds it.
    """
    weights = {kl_name(key): _kernel(value) for key, value in public.items()}
    for part in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            joined = f"{part}.mid_block.attentions.0.to_qkv.{kind}"
            names = [f"{joined} ({n})" for n in "qkv"]
            if all(name in weights for name in names):
                weights[joined] = mx.concatenate([weights.pop(name) for name in names])
    return weights


def read_taehv(path: Path) -> TinyAutoencoder:
    """Load a tiny autoencoder in the layout of `taew2_1.safetensors`.

    Raises:
        UserError: a key that is missing, unknown or misshapen, as in the family's other layouts.
    """
    public = _read(path)
    config = taehv_config(public, path)
    return _filled(TinyAutoencoder(config), taehv_weights(public), path)


def taehv_config(public: Weights, path: Path) -> AutoencoderConfig:
    """The sizes that the weights show; `UserError` when they are of something else."""
    try:
        return dataclasses.replace(
            TAEW2_1,
            latent_channels=public["decoder.1.weight"].shape[1],
            encoder_channels=(public["encoder.0.weight"].shape[0],) * 4,
            decoder_channels=tuple(public[f"decoder.{i}.weight"].shape[0] for i in (1, 8, 14, 20)),
        )
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is no TAEHV autoencoder: it lacks {error}") from None


_PLACES = {
    "encoder": {
        **{"0": "conv_in", "17": "conv_out"},
        **{str(2 + 5 * level): f"pools.{level}" for level in range(3)},
        **{str(3 + 5 * level): f"downs.{level}" for level in range(3)},
        **{str(4 + 5 * level + k): f"blocks.{level}.{k}" for level in range(3) for k in range(3)},
    },
    "decoder": {
        **{"1": "conv_in", "22": "conv_out"},
        **{str(3 + 6 * level + k): f"blocks.{level}.{k}" for level in range(3) for k in range(3)},
        **{str(7 + 6 * level): f"grows.{level}" for level in range(3)},
        **{str(8 + 6 * level): f"ups.{level}" for level in range(3)},
    },
}
"""Our name of each numbered layer."""


def taehv_name(key: str) -> str:
    """Our name of a public key; `UserError`: a key of another network."""
    part, _, rest = key.partition(".")
    number, _, rest = rest.partition(".")
    place = _PLACES.get(part, {}).get(number)
    if place is None:
        raise UserError(f"another network than those of the TAEHV family: it has '{key}'")
    if place.startswith("blocks"):
        # conv.0, conv.2, conv.4: what is between them has no weights
        return f"{part}.{place}." + re.sub(
            r"^conv\.([024])\.", lambda m: f"conv{int(m[1]) // 2 + 1}.", rest
        )
    return f"{part}.{place}." + rest.removeprefix("conv.")


def taehv_weights(public: Weights) -> Weights:
    """The public keys and layout to ours, reduced to one picture (see `tiny_autoencoder`)."""
    weights = {taehv_name(key): _kernel(value) for key, value in public.items()}
    for part, with_memory in (("encoder", 0), ("decoder", 2)):
        for level in {0, 1, 2} - {with_memory}:
            for k in range(3):
                name = f"{part}.blocks.{level}.{k}.conv1.weight"
                if name in weights:
                    # The other half of the input is the empty memory.
                    weights[name] = weights[name][..., : weights[name].shape[-1] // 2]
    if (pool := weights.get("encoder.pools.0.weight")) is not None:
        weights["encoder.pools.0.weight"] = sum(mx.split(pool, 2, axis=1))
    for level in (0, 2):
        if (grow := weights.get(f"decoder.grows.{level}.weight")) is not None:
            weights[f"decoder.grows.{level}.weight"] = grow[-grow.shape[1] :]
    return weights


def _kernel(value: mx.array) -> mx.array:
    """(O, I, H, W) -> MLX's (O, H, W, I), or (O, I) of a linear layer where H = W = 1."""
    if value.ndim != 4:
        return value
    if value.shape[2:] == (1, 1):
        return value.reshape(value.shape[:2])
    return value.transpose(0, 2, 3, 1)


def _read(path: Path) -> Weights:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not a .safetensors file")
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None


def _filled(module: nn.Module, weights: Weights, path: Path) -> Any:
    """`module` with all of the weights in it, contiguous and in float32."""
    weights = {name: mx.contiguous(v.astype(mx.float32)) for name, v in weights.items()}
    try:
        module.load_weights(list(weights.items()))
    except ValueError as error:
        listed = " ".join(str(error).split())
        raise UserError(f"{path} is another network: {listed}") from None
    mx.eval(module.parameters())
    return module
