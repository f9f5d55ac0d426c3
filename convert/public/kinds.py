"""What can be converted: one entry of `KINDS` for each.

A kind knows what config.json calls its network, the name of each public key in ours, and how a
checkpoint's lazy weights become ours. All else (streaming, types, quantization, the report) is the
same for every kind and in `from_torch`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.public.keys.autoencoders import (
    kl_config,
    kl_name,
    kl_weights,
    qwen_image_config,
    qwen_image_name,
    qwen_image_weights,
    taehv_config,
    taehv_name,
    taehv_weights,
)
from convert.public.keys.gemma import GEMMA_FILES, gemma_config, gemma_name, gemma_shapes
from convert.public.keys.lora import lora_metadata, lora_name, lora_weights
from convert.public.keys.transformers import make_transformer, transformer_name
from convert.public.source import Source
from mlx_snapgen.checkpoint import clip
from mlx_snapgen.checkpoint.module import FORMAT_VERSION, matrices
from mlx_snapgen.config import AutoencoderConfig, to_dict
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder
from mlx_snapgen.teachers.folder import quantizable

Weights = dict[str, mx.array]
Config = Callable[[dict[str, int] | None], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What a conversion will write."""

    weights: Weights
    """Under our names, lazy."""
    file: str
    """Name of the file of weights."""
    config: Config | None = None
    """Gives config.json for a quantization or None; without one the output is a single file."""
    expected: Mapping[str, tuple[int, ...]] | None = None
    """Every weight that the network has; None where only the checkpoint knows."""
    matrices: Callable[[int], list[str]] = lambda group_size: []
    """Layers that a group size divides, which `bits` quantizes."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """More files of the output folder."""
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """A public network."""

    about: str
    rename: Callable[[str], str | None]
    """Our name of a public key, None where it is left out; `UserError`: of another network."""
    left_out: str
    """Why keys are."""
    plan: Callable[[Source, Weights], Plan]
    classes: tuple[str, ...] = ()
    """What config.json calls it: `_class_name`, `architectures` or `model_type`."""


# --- parts of a model ---------------------------------------------------------------------------


def _part(
    name: str,
    values: dict[str, Any],
    module: nn.Module,
    weights: Weights,
    files: Mapping[str, bytes] | None = None,
) -> Plan:
    """A model folder with one part: config.json, `name`.safetensors, perhaps a tokenizer."""

    def config(how: dict[str, int] | None) -> dict[str, Any]:
        quantization = None if how is None else {name: how}
        return {
            "format_version": FORMAT_VERSION,
            "part": name,
            name: values,
            "quantization": quantization,
        }

    shapes = {key: value.shape for key, value in tree_flatten(module.parameters())}
    return Plan(
        weights,
        f"{name}.safetensors",
        config,
        shapes,
        lambda group_size: matrices(module, group_size),
        files or {},
    )


def _config_of(source: Source) -> dict[str, Any]:
    if source.config is None:
        raise UserError(f"{source.path} needs the config.json of its folder: give the folder")
    return source.config


def _public_autoencoder(
    name: str,
    read: Callable[[dict[str, Any]], AutoencoderConfig],
    weights: Callable[[Weights], Weights],
) -> Callable[[Source, Weights], Plan]:
    """What makes a plan out of diffusers' folder of the class `name`."""

    def plan(source: Source, public: Weights) -> Plan:
        values = _config_of(source)
        try:
            config = read(values)
        except (KeyError, TypeError, IndexError) as error:
            path = source.folder / "config.json"
            raise UserError(f"{path} does not describe an {name}: {error!r}") from None
        module = make_autoencoder(config)
        return _part("autoencoder", to_dict(config), module, weights(public))

    return plan


def _taehv(source: Source, public: Weights) -> Plan:
    config = taehv_config(public, source.path)
    return _part("autoencoder", to_dict(config), make_autoencoder(config), taehv_weights(public))


def _clip(source: Source, public: Weights) -> Plan:
    weights = clip.sanitize(public)
    config, tokenizer = clip.describe(source.folder, weights)
    module = ClipTextEncoder(config, tokenizer)
    files = {"tokenizer_0.model": tokenizer.model}
    return _part("text_encoder_0", to_dict(config), module, weights, files)


def _teacher(source: Source, public: Weights) -> Plan:
    """A public teacher's transformer, of which only the blocks are quantized."""
    kind, network = make_transformer(_config_of(source), source.folder / "config.json")
    plan = _part("transformer", {"kind": kind} | to_dict(network.config), network, public)

    def layers(group_size: int) -> list[str]:
        return [key.removesuffix(".weight") for key in quantizable(network, group_size)]

    return replace(plan, matrices=layers)


# --- in the formats of others -------------------------------------------------------------------


def _gemma(source: Source, public: Weights) -> Plan:
    """A folder as mlx-lm has it, the source of a `gemma` text encoder."""
    config = gemma_config(_config_of(source), source.folder / "config.json")
    weights = {gemma_name(key): value for key, value in public.items()}
    weights.pop(None, None)

    def finish(how: dict[str, int] | None) -> dict[str, Any]:
        return config if how is None else config | {"quantization": how}

    def layers(group_size: int) -> list[str]:
        return [
            key.removesuffix(".weight")
            for key, value in weights.items()
            if value.ndim == 2 and value.shape[-1] % group_size == 0
        ]

    files = {
        path.name: path.read_bytes()
        for name in GEMMA_FILES
        if (path := source.folder / name).is_file()
    }
    return Plan(weights, "model.safetensors", finish, gemma_shapes(config), layers, files)


def _lora(source: Source, public: Weights) -> Plan:
    weights = lora_weights(source.path, public)
    return Plan(weights, "lora.safetensors", metadata=lora_metadata(source.files[0]))


KINDS: dict[str, Kind] = {
    "qwen-image-vae": Kind(
        "Qwen-Image's autoencoder, a folder of diffusers",
        qwen_image_name,
        "changes the frame rate of video",
        _public_autoencoder("AutoencoderKLQwenImage", qwen_image_config, qwen_image_weights),
        ("AutoencoderKLQwenImage",),
    ),
    "kl-vae": Kind(
        "the autoencoder of Flux and Z-Image, a folder of diffusers",
        kl_name,
        "",
        _public_autoencoder("AutoencoderKL", kl_config, kl_weights),
        ("AutoencoderKL",),
    ),
    "taehv": Kind("a tiny autoencoder such as taew2_1", taehv_name, "", _taehv),
    "clip": Kind(
        "CLIP's text tower, TinyCLIP's too: Hugging Face's or OpenCLIP's layout",
        clip.public_name,
        "not of the text tower's states",
        _clip,
        ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "clip", "clip_text_model"),
    ),
    "gemma": Kind(
        "a Gemma 3 as text encoder, in mlx-lm's format",
        gemma_name,
        "not of the text's states",
        _gemma,
        (
            "Gemma3ForConditionalGeneration",
            "Gemma3Model",
            "Gemma3ForCausalLM",
            "Gemma3TextModel",
            "gemma3",
            "gemma3_text",
        ),
    ),
    "qwen-image": Kind(
        "Qwen-Image's transformer, for convert.teacher",
        partial(transformer_name, "qwen-image"),
        "",
        _teacher,
        ("QwenImageTransformer2DModel",),
    ),
    "z-image": Kind(
        "Z-Image's transformer, for convert.teacher",
        partial(transformer_name, "z-image"),
        "",
        _teacher,
        ("ZImageTransformer2DModel",),
    ),
    "lora": Kind("a LoRA, under the keys of diffusers, PEFT or kohya", lora_name, "", _lora),
}
"""Name -> kind, as `--kind` takes it."""


# --- detection ----------------------------------------------------------------------------------


def find_kind(source: Source, weights: Weights, name: str | None = None) -> str:
    """The kind of a checkpoint: `name`, what its config says, or what knows its keys.

    Raises:
        UserError: no such kind, or a checkpoint that is of none.
    """
    if name is not None:
        if name not in KINDS:
            raise UserError(f"no kind '{name}'{nearest(name, KINDS)}, known: {', '.join(KINDS)}")
        return name
    said = _class_names(source.config or {})
    for candidate, kind in KINDS.items():
        if set(said) & set(kind.classes):
            return candidate
    known = {candidate: _known(kind, weights) for candidate, kind in KINDS.items()}
    best = max(known, key=known.get)
    if known[best] == len(weights) and not said:
        return best
    classes = {c: k for k, kind in KINDS.items() for c in kind.classes}
    called = f", which config.json calls {said[0]}{nearest(said[0], classes)}" if said else ""
    near = f"; '{best}' knows {known[best]} of its {len(weights)} keys" if known[best] else ""
    raise UserError(
        f"{source.path} is of no known kind{called}{near}: choose with --kind {{{','.join(KINDS)}}}"
    )


def _class_names(config: Mapping[str, Any]) -> list[str]:
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return [name for name in (*names, config.get("model_type")) if isinstance(name, str)]


def _known(kind: Kind, weights: Weights) -> int:
    """How many keys a kind knows, if it takes any of them."""
    count = taken = 0
    for key in weights:
        try:
            taken += kind.rename(key) is not None
            count += 1
        except UserError:
            pass
    return count if taken else 0
