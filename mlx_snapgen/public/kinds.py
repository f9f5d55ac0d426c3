"""The public networks that can be converted, one entry of `KINDS` for each.

A kind has the name of its network in config.json, a table of its weights, and a function that plans
the output. Streaming, types, quantization and the report are the same for all kinds, in
`mlx_snapgen.public.convert`. A new autoencoder or text encoder also needs its network under
mlx_snapgen/networks/ (autoencoders/registry.py lists the places), and its table under keys/.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.nn as nn

from mlx_snapgen.checkpoint import clip, clip_towers, t5
from mlx_snapgen.checkpoint.language_models import check_qwen, text_tower_name
from mlx_snapgen.checkpoint.module import FORMAT_VERSION, Shapes, matrices, shapes
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.formats import class_names
from mlx_snapgen.json_values import check_sizes, to_dict
from mlx_snapgen.lora.things import KEY as THING_ROWS
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.clip import Clip
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder, T5Tokenizer
from mlx_snapgen.public.keymap import Renaming, Weights
from mlx_snapgen.public.keys.autoencoders import AUTOENCODERS
from mlx_snapgen.public.keys.gemma import GEMMA_FILES, GEMMA_KEYS, gemma_config, gemma_shapes
from mlx_snapgen.public.keys.lora import lora_metadata, lora_name, lora_weights
from mlx_snapgen.public.keys.t5 import T5_KEYS
from mlx_snapgen.public.keys.transformers import TRANSFORMER_KEYS, make_transformer
from mlx_snapgen.public.source import Source, check_no_pipeline, config_of
from mlx_snapgen.reading import read_bytes
from mlx_snapgen.teachers.folder import quantizable

Config = Callable[[dict[str, int] | None], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The output of a conversion."""

    weights: Weights
    """Under our names, lazy."""
    file: str
    """Name of the file of weights."""
    config: Config | None = None
    """config.json for a quantization or None. Without this the output is a single file."""
    expected: Shapes | None = None
    """Every weight of the network; None if only the checkpoint determines them."""
    matrices: Callable[[int], list[str]] = lambda group_size: []
    """Layers to quantize in groups of a size that divides their rows."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """More files of the output folder."""
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """A public network."""

    about: str
    keys: Renaming
    ignored_because: str
    """Why some of its weights are ignored."""
    plan: Callable[[Source, Weights], Plan]
    classes: tuple[str, ...] = ()
    """Its names in config.json: `_class_name`, `architectures` or `model_type`."""


# --- parts of a model ---------------------------------------------------------------------------


def _part(
    name: str,
    values: dict[str, Any],
    module: nn.Module,
    weights: Weights,
    files: Mapping[str, bytes] | None = None,
) -> Plan:
    """A model folder with one part: config.json, `name`.safetensors, and further `files`."""

    def config(how: dict[str, int] | None) -> dict[str, Any]:
        quantization = None if how is None else {name: how}
        return {
            "format_version": FORMAT_VERSION,
            "part": name,
            name: values,
            "quantization": quantization,
        }

    return Plan(
        weights,
        f"{name}.safetensors",
        config,
        shapes(module.parameters()),
        lambda group_size: matrices(module, group_size),
        files or {},
    )


def _autoencoder(kind: str, source: Source, public: Weights) -> Plan:
    config = AUTOENCODERS[kind].config(source, public)
    weights = AUTOENCODERS[kind].keys.weights(public)
    return _part("autoencoder", to_dict(config), make_autoencoder(config), weights)


def _clip(source: Source, public: Weights) -> Plan:
    weights = clip.sanitize(public)
    config, tokenizer = clip.describe(source.folder, weights)
    module = ClipTextEncoder(config, tokenizer)
    files = {"tokenizer_0.model": tokenizer.model}
    return _part("text_encoder_0", to_dict(config), module, weights, files)


def _clip_towers(source: Source, public: Weights) -> Plan:
    weights = clip_towers.sanitize(public)
    config, tokenizer = clip_towers.describe(source.folder, weights)
    files = {clip_towers.TOKENIZER: tokenizer.model}
    return _part(clip_towers.PART, to_dict(config), Clip(config, tokenizer), weights, files)


def _teacher(source: Source, public: Weights) -> Plan:
    """A public teacher's transformer; only its blocks are quantized."""
    kind, network = make_transformer(config_of(source), source.folder / "config.json")
    values = {"kind": kind} | to_dict(network.config)
    plan = _part("transformer", values, network, TRANSFORMER_KEYS[kind].weights(public))

    def layers(group_size: int) -> list[str]:
        return [key.removesuffix(".weight") for key in quantizable(network, group_size)]

    return replace(plan, matrices=layers)


# --- in the formats of others -------------------------------------------------------------------


def _language_model(
    config: dict[str, Any],
    weights: Weights,
    *,
    expected: Shapes | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Plan:
    """A folder in mlx-lm's format; `config`: its config.json without quantization."""

    def finish(how: dict[str, int] | None) -> dict[str, Any]:
        return config if how is None else config | {"quantization": how}

    def layers(group_size: int) -> list[str]:
        return [
            key.removesuffix(".weight")
            for key, value in weights.items()
            if value.ndim == 2 and value.shape[-1] % group_size == 0
        ]

    return Plan(weights, "model.safetensors", finish, expected, layers, files or {})


def _gemma(source: Source, public: Weights) -> Plan:
    """A folder in mlx-lm's format, the source of a `gemma` text encoder."""
    config = gemma_config(config_of(source), source.folder / "config.json")
    weights = GEMMA_KEYS.weights(public)
    files = {
        path.name: read_bytes(path)
        for name in GEMMA_FILES
        if (path := source.folder / name).is_file()
    }
    return _language_model(config, weights, expected=gemma_shapes(config), files=files)


QWEN_NAME = re.compile(
    r"model\.(embed_tokens|norm"
    r"|layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm))\."
)


def _qwen_name(key: str) -> str | None:
    """See `text_tower_name`."""
    name = text_tower_name(key)
    if name is not None and not QWEN_NAME.match(name):
        raise UserError(f"'{key}' belongs to no Qwen language model")
    return name


def _qwen(source: Source, public: Weights) -> Plan:
    """A folder in mlx-lm's format, without a tokenizer: the text encoder of a public model."""
    config = config_of(source)
    check_sizes(config, source.folder / "config.json")
    check_qwen(config, source.folder / "config.json")
    named = {_qwen_name(key): value for key, value in public.items()}
    weights = {name: value for name, value in named.items() if name is not None}
    return _language_model(config, weights)


def _t5(source: Source, public: Weights) -> Plan:
    """A folder with transformers' config and names: the text encoder of a public model."""
    values, path = config_of(source), source.folder / "config.json"
    network = T5Encoder(t5.t5_config(values, path))
    tokenizer = source.folder / t5.TOKENIZER
    if not tokenizer.is_file():
        # Of a whole pipeline.
        tokenizer = source.folder.parent / "tokenizer" / t5.TOKENIZER
    files = {t5.TOKENIZER: T5Tokenizer.from_file(tokenizer).model}

    def finish(how: dict[str, int] | None) -> dict[str, Any]:
        return values if how is None else values | {"quantization": how}

    def layers(group_size: int) -> list[str]:
        found = matrices(network, group_size)
        return [path for path in found if not path.endswith("relative_attention_bias")]

    expected = shapes(network.parameters())
    return Plan(T5_KEYS.weights(public), "model.safetensors", finish, expected, layers, files)


def _lora(source: Source, public: Weights) -> Plan:
    weights = lora_weights(source.path, public)
    return Plan(weights, "lora.safetensors", metadata=lora_metadata(source.files[0]))


KINDS: dict[str, Kind] = {
    "qwen-image-vae": Kind(
        "Qwen-Image's autoencoder, a folder in diffusers' format",
        AUTOENCODERS["qwen-image-vae"].keys,
        "changes the frame rate of video",
        partial(_autoencoder, "qwen-image-vae"),
        ("AutoencoderKLQwenImage",),
    ),
    "kl-vae": Kind(
        "the autoencoder of Flux and Z-Image, a folder in diffusers' format",
        AUTOENCODERS["kl-vae"].keys,
        "",
        partial(_autoencoder, "kl-vae"),
        ("AutoencoderKL",),
    ),
    "flux2-vae": Kind(
        "FLUX.2's autoencoder, a folder in diffusers' format",
        AUTOENCODERS["flux2-vae"].keys,
        "statistics of the latents, which are in config.json",
        partial(_autoencoder, "flux2-vae"),
        ("AutoencoderKLFlux2",),
    ),
    "dc-ae": Kind(
        "DC-AE, the autoencoder of SANA, a folder in diffusers' format",
        AUTOENCODERS["dc-ae"].keys,
        "",
        partial(_autoencoder, "dc-ae"),
        ("AutoencoderDC",),
    ),
    "taehv": Kind(
        "a tiny autoencoder such as taew2_1",
        AUTOENCODERS["taehv"].keys,
        "",
        partial(_autoencoder, "taehv"),
    ),
    "clip": Kind(
        "CLIP's text tower, TinyCLIP's too: Hugging Face's or OpenCLIP's layout",
        Renaming(clip.public_name),
        "not needed for the text tower's states",
        _clip,
        ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "clip", "clip_text_model"),
    ),
    "clip-score": Kind(
        "both towers of a CLIP, for the measures of train.evaluate; never detected, choose it",
        Renaming(clip_towers.public_name),
        "no weights",
        _clip_towers,
    ),
    "gemma": Kind(
        "a Gemma 3 as text encoder, in mlx-lm's format",
        GEMMA_KEYS,
        "not needed for the text's states",
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
        TRANSFORMER_KEYS["qwen-image"],
        "",
        _teacher,
        ("QwenImageTransformer2DModel",),
    ),
    "z-image": Kind(
        "Z-Image's transformer, for convert.teacher",
        TRANSFORMER_KEYS["z-image"],
        "",
        _teacher,
        ("ZImageTransformer2DModel",),
    ),
    "flux2": Kind(
        "FLUX.2 klein's transformer, for convert.teacher",
        TRANSFORMER_KEYS["flux2"],
        "",
        _teacher,
        ("Flux2Transformer2DModel",),
    ),
    "minit2i": Kind(
        "MiniT2I's transformer, for convert.teacher",
        TRANSFORMER_KEYS["minit2i"],
        "has no effect on the picture",
        _teacher,
        ("MiniT2IMMJiTModel",),
    ),
    "t5": Kind(
        "the encoder of a T5 1.1 or FLAN-T5, the text encoder of MiniT2I",
        T5_KEYS,
        "not needed for the text's states",
        _t5,
        ("T5ForConditionalGeneration", "T5EncoderModel", "T5Model", "t5"),
    ),
    "qwen": Kind(
        "a Qwen3 or Qwen2.5-VL as text encoder of a public model, in mlx-lm's format",
        Renaming(_qwen_name),
        "not needed for the text's states",
        _qwen,
        (
            "Qwen3ForCausalLM",
            "Qwen3Model",
            "Qwen2_5_VLForConditionalGeneration",
            "qwen3",
            "qwen2_5_vl",
        ),
    ),
    "lora": Kind(
        "a LoRA with the keys of diffusers, PEFT or kohya", Renaming(lora_name), "", _lora
    ),
}
"""Value of `--kind` -> kind."""


# --- detection ----------------------------------------------------------------------------------


def find_kind(source: Source, weights: Weights, name: str | None = None) -> str:
    """The kind of a checkpoint: `name`, the kind of its config, or the kind that has its keys.

    Raises:
        UserError: no such kind, or a checkpoint of an unknown kind.
    """
    if THING_ROWS in weights:
        raise UserError(
            f"{source.path} is a LoRA of train.lora, which needs no conversion: draw with it with "
            "generate --lora"
        )
    if name is not None:
        if name not in KINDS:
            raise UserError(f"no kind '{name}'{nearest(name, KINDS)}, known: {', '.join(KINDS)}")
        return name
    names = class_names(source.config or {})
    for candidate, kind in KINDS.items():
        if set(names) & set(kind.classes):
            return candidate
    known = {candidate: _known(kind, weights) for candidate, kind in KINDS.items()}
    best = max(known, key=known.__getitem__)
    if known[best] == len(weights) and not names:
        return best
    check_no_pipeline(source)
    classes = {c: k for k, kind in KINDS.items() for c in kind.classes}
    called = f", '{names[0]}' in config.json{nearest(names[0], classes)}" if names else ""
    near = f"; '{best}' has {known[best]} of its {len(weights)} keys" if known[best] else ""
    raise UserError(
        f"{source.path} is of an unknown kind{called}{near}: choose --kind {{{','.join(KINDS)}}}"
    )


def _known(kind: Kind, weights: Weights) -> int:
    """How many of the keys a kind has; 0 if it ignores all of them."""
    count = taken = 0
    for key in weights:
        try:
            taken += kind.keys.find(key).name is not None
            count += 1
        except UserError:
            pass
    return count if taken else 0
