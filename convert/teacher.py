"""Make a public flow model a teacher that `train.kd` and `train.kdmd` can learn from.

    python -m convert.teacher Qwen/Qwen-Image --output qwen-image --bits 4
    python -m convert.teacher Tongyi-MAI/Z-Image-Turbo --output z-image
    python -m convert.teacher Qwen/Qwen-Image --output qwen-image --bits 4 \\
        --few-step-lora Qwen-Image-Lightning-4steps-V1.0.safetensors

The source is a folder as diffusers has it, or a repository on Hugging Face. `--bits` stores the
matrices of the transformer's blocks quantized, file by file, so that no more than one of the
source's files is in memory.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.autoencoder import read_autoencoder
from mlx_snapgen.config import to_dict
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.hub import find_model
from mlx_snapgen.lora_files import load_lora
from mlx_snapgen.teachers.config import (
    LIGHTNING,
    TURBO,
    QwenTransformerConfig,
    Schedule,
    TeacherConfig,
    ZImageTransformerConfig,
)
from mlx_snapgen.teachers.folder import CONFIG, FORMAT_VERSION, NETWORKS, quantizable
from mlx_snapgen.teachers.text import FILES
from mlx_snapgen.weights import BITS, FEW_STEP, GROUP_SIZES

Weights = dict[str, mx.array]


# --- the transformer --------------------------------------------------------------------------


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
        kind, config = transformer_config(values)
        return NETWORKS[kind](config)
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


def transformer_config(values: dict[str, Any]) -> tuple[str, Any]:
    """Kind of teacher and our config, from the transformer's config.json in diffusers."""
    name = values.get("_class_name")
    if name not in CONFIGS:
        raise UserError(
            f"expected one of {', '.join(CONFIGS)}, got {name}: give a model in diffusers' format"
        )
    kind, read = CONFIGS[name]
    return kind, read(values)


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


CONFIGS = {
    "QwenImageTransformer2DModel": ("qwen-image", qwen_transformer_config),
    "ZImageTransformer2DModel": ("z-image", z_image_transformer_config),
}
"""diffusers' class -> kind of teacher, and what reads its config."""


# --- the whole model --------------------------------------------------------------------------


SCHEDULES = {"qwen-image": (Schedule(), LIGHTNING), "z-image": (TURBO, TURBO)}
"""Kind of teacher -> its schedule and that of its few-step mode. Z-Image-Turbo is such a mode."""


def read_schedule(folder: Path, like: Schedule) -> Schedule:
    """Noise levels as scheduler_config.json in `folder` has them, all else as in `like`.

    Raises:
        UserError: another kind of schedule.
    """
    values = _json(folder / "scheduler_config.json")
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if values.get(key):
            raise UserError(f"{folder}: a schedule with {key} is not supported")
    try:
        if values.get("use_dynamic_shifting"):
            if values.get("time_shift_type", "exponential") != "exponential":
                raise UserError(f"{folder}: only an exponential time shift is supported")
            shifts = values["base_shift"], values["max_shift"]
            tokens = values["base_image_seq_len"], values["max_image_seq_len"]
        else:
            shifts, tokens = (math.log(values["shift"]),) * 2, like.tokens
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not describe a flow-matching schedule: {error!r}") from None
    return dataclasses.replace(
        like, log_shifts=shifts, tokens=tokens, terminal=values.get("shift_terminal") or 0.0
    )


def convert_teacher(
    source: Path,
    output: Path,
    quantization: dict[str, int] | None = None,
    few_step_lora: Path | None = None,
    text_encoder: str | None = None,
) -> None:
    """Write the model in `source`, a folder of diffusers, as a teacher's folder.

    Args:
        output: must not exist yet, or be empty.
        quantization: {"bits", "group_size"} to store the transformer's blocks in; None keeps them.
        few_step_lora: of the few-step mode, a .safetensors file.
        text_encoder: where the language model is instead of in the teacher's folder.

    Raises:
        UserError: something is missing, unknown or does not fit; nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: choose another folder or delete it")
    kind, transformer = transformer_config(_json(source / "transformer" / "config.json"))
    autoencoder = read_autoencoder(source / "vae")
    network = read_transformer(source / "transformer")
    packed = quantizable(network, quantization["group_size"]) if quantization else set()
    if few_step_lora is not None:
        load_lora(few_step_lora, network, 0.0, FEW_STEP)
    schedule, few_step = SCHEDULES[kind]
    schedule = read_schedule(source / "scheduler", schedule)
    if kind == "qwen-image" and few_step_lora is None:
        few_step = None
    config = TeacherConfig(
        kind, transformer, autoencoder.config, schedule, few_step, quantization=quantization
    )
    if text_encoder is not None:
        config = dataclasses.replace(config, text_encoder=text_encoder)
    with new_folder(output) as partial:
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        weights = dict(tree_flatten(autoencoder.parameters()))
        mx.save_safetensors(str(partial / "autoencoder.safetensors"), weights, {"format": "mlx"})
        for i, path in enumerate(weight_files(source / "transformer"), 1):
            weights = transformer_weights(read_weights(path))
            weights = _quantized(weights, packed, quantization or {})
            name = partial / f"transformer-{i:05d}.safetensors"
            mx.save_safetensors(str(name), weights, {"format": "mlx"})
            del weights
            mx.clear_cache()
        if few_step_lora is not None:
            shutil.copyfile(few_step_lora, partial / f"{FEW_STEP}.safetensors")
        if text_encoder is None:
            for part in ("tokenizer", "text_encoder"):
                _copy(source / part, partial / config.text_encoder)


def _quantized(weights: Weights, packed: set[str], how: dict[str, int]) -> Weights:
    """The weights with those among `packed` as weight, scales and biases."""
    stored = {}
    for key, value in weights.items():
        if key in packed:
            name = key.removesuffix(".weight")
            parts = mx.quantize(value, **how)
            # One by one, so that the peak is one layer's.
            mx.eval(parts)
            stored |= dict(zip((key, f"{name}.scales", f"{name}.biases"), parts, strict=True))
        else:
            stored[key] = value
    return stored


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source.parent} is incomplete: it has no folder {source.name}")
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in FILES):
            shutil.copyfile(path, target / path.name)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no list of settings")
    return values


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `output` at the end, or vanishes if that is not met."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}") from None
    try:
        yield partial
        # mkdtemp makes a private folder; a model is as readable as any other folder.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder or repository of a model in diffusers' format")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("--bits", type=int, choices=BITS, help="store the blocks quantized")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64)
    parser.add_argument("--few-step-lora", type=Path, help="for the few-step mode")
    parser.add_argument(
        "--text-encoder",
        help="folder or repository of the language model, quantized perhaps, to use instead of "
        "the source's own",
    )
    args = parser.parse_args()
    quantization = {"bits": args.bits, "group_size": args.group_size} if args.bits else None
    source = find_model(args.source, files=FILES)
    convert_teacher(source, args.output, quantization, args.few_step_lora, args.text_encoder)
    print(args.output)


if __name__ == "__main__":
    run_command(main)
