"""Public autoencoders: Qwen-Image's, Flux's (kl), FLUX.2's, DC-AE and TAEHV.

A new one needs its network in mlx_snapgen/networks/autoencoders/ and in `AUTOENCODERS` of
registry.py there, its table of weights here, and an entry in `KINDS` of public/kinds.py.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import load_autoencoder
from mlx_snapgen.checkpoint.module import read_part
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.json_values import check_positive, checked, from_dict, whole_number
from mlx_snapgen.networks.autoencoders import dc_ae
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.kl import NUM_GROUPS
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.presets import TAEW2_1
from mlx_snapgen.public.keymap import KeyMap, Row, Weights, fill, same
from mlx_snapgen.public.source import PICKLES, Source, config_of, find_source


@dataclass(frozen=True)
class PublicAutoencoder:
    """A public autoencoder."""

    keys: KeyMap
    config: Callable[[Source, Weights], AutoencoderConfig]
    """Our config of a checkpoint; `UserError` for another network."""
    class_name: str | None = None
    """Its class in diffusers; None for weights without a config.json."""


def read_autoencoder(path: Path) -> Autoencoder:
    """The autoencoder in `path`, in float32: a folder of `convert.from_torch`, or a public one.

    Raises:
        UserError: another network, or a weight that is missing, unknown or misshapen.
    """
    if read_part(path, "autoencoder") is not None:
        return load_autoencoder(path)
    if path.suffix in PICKLES:
        raise UserError(f"{path} is not a .safetensors file: convert it with convert.from_torch")
    source = find_source(str(path))
    public, name = source.weights(source.folder), (source.config or {}).get("_class_name")
    found = next((a for a in AUTOENCODERS.values() if a.class_name == name), QWEN_IMAGE)
    module = make_autoencoder(found.config(source, public))
    fill(module, found.keys, public, where=source.path)
    module.apply(lambda value: mx.contiguous(value.astype(mx.float32)))
    mx.eval(module.parameters())
    return module


# --- layouts --------------------------------------------------------------------------------------


def kernel(value: mx.array) -> mx.array:
    """(O, I, H, W) -> MLX's (O, H, W, I), or (O, I) of a linear layer where H = W = 1."""
    if value.ndim != 4:
        return value
    if value.shape[2:] == (1, 1):
        return value.reshape(value.shape[:2])
    return value.transpose(0, 2, 3, 1)


def _frame(value: mx.array) -> mx.array:
    """Keeps the last temporal slice of a 3-D kernel (O, I, T, H, W), the only one for one frame."""
    return kernel(value[:, :, -1] if value.ndim == 5 else value)


def _flat(value: mx.array) -> mx.array:
    return value.reshape(-1)


def _rows_joined(*values: mx.array) -> mx.array:
    return mx.concatenate([kernel(value) for value in values])


def _without_memory(value: mx.array) -> mx.array:
    """Removes the inputs for the memory (the second half), which is empty for one picture."""
    return kernel(value[:, : value.shape[1] // 2] if value.ndim == 4 else value)


def _pooled(value: mx.array) -> mx.array:
    """Sums the kernels of the two pooled frames, which are the same picture."""
    first, second = mx.split(kernel(value), 2, axis=1)
    return first + second


def _last_frame(value: mx.array) -> mx.array:
    """Keeps the outputs of the last of the frames that a latent becomes."""
    value = kernel(value)
    return value[-value.shape[1] :]


# --- Qwen-Image -----------------------------------------------------------------------------------


def qwen_image_config(values: dict[str, Any]) -> AutoencoderConfig:
    """Our config from diffusers' config.json; `UserError` where the two networks differ."""
    if values.get("_class_name") != "AutoencoderKLQwenImage":
        raise UserError(f"expected an AutoencoderKLQwenImage, got {values.get('_class_name')}")
    for key, only in (("attn_scales", []), ("input_channels", 3)):
        if values.get(key, only) != only:
            raise UserError(f"only {key} {only} is supported, got {values[key]}")
    for key in ("latents_mean", "latents_std"):
        if not isinstance(values[key], list) or len(values[key]) != values["z_dim"]:
            raise UserError(f"{key} needs a number for each of {values['z_dim']} channels")
    if values["dim_mult"][0] != 1:
        raise UserError(f"only a dim_mult that starts with 1 is supported: {values['dim_mult']}")
    base = whole_number(values["base_dim"], "base_dim")
    channels = tuple(base * whole_number(m, "dim_mult") for m in values["dim_mult"])
    count = whole_number(values["num_res_blocks"], "num_res_blocks")
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


QWEN_IMAGE_KEYS = KeyMap(
    "AutoencoderKLQwenImage",
    # Only changes the frame rate of video.
    Row("encoder.down_blocks.#.time_conv.weight|bias", None),
    Row("decoder.up_blocks.#.upsamplers.0.time_conv.weight|bias", None),
    Row("quant_conv.*", "encoder.quant_conv.*", _frame),
    Row("post_quant_conv.*", "decoder.post_quant_conv.*", _frame),
    Row("**.resample.1.weight|bias", "**.conv.weight|bias", _frame),
    Row("**.norm|norm1|norm2|norm_out.gamma", "**.norm|norm1|norm2|norm_out.weight", _flat),
    same("encoder|decoder.conv_in|conv_out.weight|bias", _frame),
    *(
        same(f"encoder|decoder.{block}.conv1|conv2|conv_shortcut.weight|bias", _frame)
        for block in ("down_blocks.#", "mid_block.resnets.#", "up_blocks.#.resnets.#")
    ),
    same("*.mid_block.attentions.#.to_qkv|proj.weight|bias", _frame),
)


# --- Flux and Z-Image -----------------------------------------------------------------------------


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
    latents = whole_number(values["latent_channels"], "latent_channels")
    return AutoencoderConfig(
        kind="kl",
        latent_channels=latents,
        encoder_channels=channels,
        decoder_channels=channels[::-1],
        encoder_blocks=(count,) * len(channels),
        decoder_blocks=(count + 1,) * len(channels),
        latents_mean=(values["shift_factor"] or 0.0,) * latents,
        latents_std=(_std(values),) * latents,
    )


_ATTENTION = "encoder|decoder.mid_block.attentions.0"
_ENDS = "weight|bias"
KL_KEYS = KeyMap(
    "AutoencoderKL",
    same(f"encoder|decoder.conv_in|conv_out|conv_norm_out.{_ENDS}", kernel),
    *(
        same(f"encoder|decoder.{block}.resnets.#.{layer}.{_ENDS}", kernel)
        for block in ("mid_block", "down_blocks|up_blocks.#")
        for layer in ("norm1|norm2", "conv1|conv2|conv_shortcut")
    ),
    same(f"encoder|decoder.down_blocks|up_blocks.#.downsamplers|upsamplers.0.conv.{_ENDS}", kernel),
    Row(f"{_ATTENTION}.group_norm.{_ENDS}", f"{_ATTENTION}.norm.{_ENDS}", kernel),
    Row(f"{_ATTENTION}.to_out.0.{_ENDS}", f"{_ATTENTION}.proj.{_ENDS}", kernel),
    Row(
        tuple(f"{_ATTENTION}.to_{x}.{_ENDS}" for x in "qkv"),
        f"{_ATTENTION}.to_qkv.{_ENDS}",
        _rows_joined,
    ),
)


# --- FLUX.2 ---------------------------------------------------------------------------------------


def flux2_config(values: dict[str, Any], public: Weights) -> AutoencoderConfig:
    """Our config from diffusers' config.json and the batch norm's statistics.

    Raises:
        UserError: where the two networks differ, or there are no statistics.
    """
    check_positive(values)
    only = {
        "norm_num_groups": NUM_GROUPS,
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": [2, 2],
    }
    for key, value in only.items():
        if values.get(key, value) != value:
            raise UserError(f"only an AutoencoderKLFlux2 with {key} {value} is supported")
    if not {"bn.running_mean", "bn.running_var"} <= set(public):
        raise UserError("the AutoencoderKLFlux2 lacks bn.running_mean or bn.running_var")
    mean, variance = (
        np.array(public[f"bn.{name}"].astype(mx.float32))
        for name in ("running_mean", "running_var")
    )
    std = np.sqrt(variance + np.float32(values["batch_norm_eps"]))
    channels, count = tuple(values["block_out_channels"]), values["layers_per_block"]
    return AutoencoderConfig(
        kind="flux2",
        latent_channels=values["latent_channels"],
        encoder_channels=channels,
        decoder_channels=tuple(values.get("decoder_block_out_channels") or channels)[::-1],
        encoder_blocks=(count,) * len(channels),
        decoder_blocks=(count + 1,) * len(channels),
        latents_mean=tuple(mean.tolist()),
        latents_std=tuple(std.tolist()),
    )


FLUX2_KEYS = KeyMap(
    "AutoencoderKLFlux2",
    Row("bn.running_mean|running_var|num_batches_tracked", None),
    Row(f"quant_conv.{_ENDS}", f"encoder.quant_conv.{_ENDS}", kernel),
    Row(f"post_quant_conv.{_ENDS}", f"decoder.post_quant_conv.{_ENDS}", kernel),
    *KL_KEYS.rows,
)


# --- DC-AE ----------------------------------------------------------------------------------------


def dc_ae_config(values: dict[str, Any]) -> AutoencoderConfig:
    """Our config from diffusers' config.json; `UserError` for another network than SANA's."""
    local, count = dc_ae.LOCAL_LEVELS, dc_ae.LEVELS
    blocks = ["ResBlock"] * local + ["EfficientViTBlock"] * (count - local)
    scales = [[]] * local + [[dc_ae.SCALE]] * (count - local)
    # With diffusers' defaults, which config.json may omit.
    only: dict[str, tuple[Any, Any]] = {
        "in_channels": (3, 3),
        "attention_head_dim": (dc_ae.HEAD_DIM, 32),
        "downsample_block_type": ("conv", "pixel_unshuffle"),
        "upsample_block_type": ("interpolate", "pixel_shuffle"),
        "decoder_norm_types": ("rms_norm", "rms_norm"),
        "decoder_act_fns": ("silu", "silu"),
        "decoder_conv_act_fn": ("relu", "relu"),
        "encoder_out_shortcut": (True, True),
        "decoder_in_shortcut": (True, True),
    }
    for part in ("encoder", "decoder"):
        only[f"{part}_block_types"] = blocks, "ResBlock"
        only[f"{part}_qkv_multiscales"] = scales, scales
    for key, (value, default) in only.items():
        found = values.get(key, default)
        if (found.lower() if key == "downsample_block_type" else found) not in (value, [value] * 6):
            raise UserError(f"only an AutoencoderDC with {key} {value}, as in SANA, is supported")
    latents = values["latent_channels"]
    config = {
        "kind": "dc-ae",
        "latent_channels": latents,
        "encoder_channels": values["encoder_block_out_channels"],
        "decoder_channels": values["decoder_block_out_channels"][::-1],
        "encoder_blocks": values["encoder_layers_per_block"],
        "decoder_blocks": values["decoder_layers_per_block"][::-1],
        "latents_mean": [0.0] * latents,
        "latents_std": [_std(values)] * latents,
    }
    return from_dict(AutoencoderConfig, config)


_BLOCK = "encoder|decoder.down_blocks|up_blocks.#.#"
DC_AE_KEYS = KeyMap(
    "AutoencoderDC",
    same(f"encoder|decoder.conv_in|conv_out.{_ENDS}", kernel),
    same(f"decoder.norm_out.{_ENDS}"),
    same(f"{_BLOCK}.conv|conv1|conv2.{_ENDS}", kernel),
    same(f"{_BLOCK}.norm.{_ENDS}"),
    Row(
        tuple(f"{_BLOCK}.attn.to_{x}.weight" for x in "qkv"),
        f"{_BLOCK}.attn.to_qkv.weight",
        _rows_joined,
    ),
    same(f"{_BLOCK}.attn.to_qkv_multiscale.#.proj_in|proj_out.weight", kernel),
    same(f"{_BLOCK}.attn.to_out|norm_out.{_ENDS}"),
    same(f"{_BLOCK}.conv_out.conv_inverted|conv_depth|conv_point|norm.{_ENDS}", kernel),
)


# --- TAEHV ----------------------------------------------------------------------------------------


def taehv_config(public: Weights, path: Path) -> AutoencoderConfig:
    """Our config, from the shapes of the weights; `UserError` for another network."""
    try:
        return dataclasses.replace(
            TAEW2_1,
            latent_channels=public["decoder.1.weight"].shape[1],
            encoder_channels=(public["encoder.0.weight"].shape[0],) * 4,
            decoder_channels=tuple(public[f"decoder.{i}.weight"].shape[0] for i in (1, 8, 14, 20)),
        )
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} is no TAEHV autoencoder: it lacks {error}") from None


def _taehv_rows() -> list[Row]:
    """The numbered layers of the video network (see networks/autoencoders/taehv.py)."""
    places = {"encoder.0": "encoder.conv_in", "encoder.17": "encoder.conv_out"}
    places |= {"decoder.1": "decoder.conv_in", "decoder.22": "decoder.conv_out"}
    rows = []
    for i in range(3):
        places |= {f"encoder.{3 + 5 * i}": f"encoder.downs.{i}"}
        places |= {f"decoder.{8 + 6 * i}": f"decoder.ups.{i}"}
        pool, grow = (_pooled if i == 0 else kernel), (kernel if i == 1 else _last_frame)
        rows.append(Row(f"encoder.{2 + 5 * i}.conv.*", f"encoder.pools.{i}.*", pool))
        rows.append(Row(f"decoder.{7 + 6 * i}.conv.*", f"decoder.grows.{i}.*", grow))
        for part, first, has_memory in (
            ("encoder", 4 + 5 * i, i == 0),
            ("decoder", 3 + 6 * i, i == 2),
        ):
            for k in range(3):
                public, ours = f"{part}.{first + k}", f"{part}.blocks.{i}.{k}"
                conv1 = kernel if has_memory else _without_memory
                rows.append(Row(f"{public}.conv.0.*", f"{ours}.conv1.*", conv1))
                rows.append(Row(f"{public}.conv.2.*", f"{ours}.conv2.*", kernel))
                rows.append(Row(f"{public}.conv.4.*", f"{ours}.conv3.*", kernel))
                rows.append(Row(f"{public}.skip.*", f"{ours}.skip.*", kernel))
    return rows + [Row(f"{a}.*", f"{b}.*", kernel) for a, b in places.items()]


TAEHV_KEYS = KeyMap("TAEHV autoencoder", *_taehv_rows())


def _std(values: dict[str, Any]) -> float:
    """The standard deviation of the latents in diffusers' config."""
    if values["scaling_factor"] == 0:
        raise UserError("'scaling_factor' must not be 0")
    return 1 / values["scaling_factor"]


# --- all ------------------------------------------------------------------------------------------


def _described(
    read: Callable[[dict[str, Any], Weights], AutoencoderConfig],
) -> Callable[[Source, Weights], AutoencoderConfig]:
    """A `PublicAutoencoder.config` that reads config.json and names it in errors."""

    def config(source: Source, public: Weights) -> AutoencoderConfig:
        path = source.folder / "config.json"
        try:
            with naming(path):
                return checked(read(config_of(source), public))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{path} does not describe an autoencoder: {error!r}") from None

    return config


QWEN_IMAGE = PublicAutoencoder(
    QWEN_IMAGE_KEYS,
    _described(lambda values, _: qwen_image_config(values)),
    "AutoencoderKLQwenImage",
)
KL = PublicAutoencoder(KL_KEYS, _described(lambda values, _: kl_config(values)), "AutoencoderKL")
FLUX2 = PublicAutoencoder(FLUX2_KEYS, _described(flux2_config), "AutoencoderKLFlux2")
DC_AE = PublicAutoencoder(
    DC_AE_KEYS, _described(lambda values, _: dc_ae_config(values)), "AutoencoderDC"
)
TAEHV = PublicAutoencoder(
    TAEHV_KEYS, lambda source, public: checked(taehv_config(public, source.path))
)
AUTOENCODERS = {
    "qwen-image-vae": QWEN_IMAGE,
    "kl-vae": KL,
    "flux2-vae": FLUX2,
    "dc-ae": DC_AE,
    "taehv": TAEHV,
}
"""By kind, as in `mlx_snapgen.public.kinds`."""
