"""Public CLIP checkpoints as text encoders: names, sizes and tokenizer."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.module import check_fit, load_weights, shapes
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.formats import INDEX, class_names
from mlx_snapgen.json_values import check_only, from_dict
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.reading import (
    MOST_BYTES,
    decode_text,
    open_regular,
    read_json,
    read_object,
    read_text,
)

FILES = ("*.json", "*.safetensors", "merges.txt", "*.txt.gz", "*.model")
"""Files to download from a public repository for `load_clip`."""

WRONG_KIND = (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError)
"""Errors of values in the JSON files of other tools that have another type or structure."""

_PREFIX = re.compile(r"^(module\.|_text_encoder\.|text_encoder\.|text_model\.|text\.)+")

_LEFT_OUT = re.compile(
    r"(visual|vision_model|_image_encoder|visual_projection)\..*"
    r"|(_?logit_scale\.)?(module\.)?(logit_scale|logit_bias)"
    r"|text_projection(\.weight)?|(embeddings\.)?position_ids|attn_mask"
)

LAYER_NAMES = (
    # Hugging Face
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"layers.\1.norm\2."),
    (r"encoder\.layers\.(\d+)\.self_attn\.(q|k|v|out)_proj\.", r"layers.\1.\2_proj."),
    (r"encoder\.layers\.(\d+)\.mlp\.fc([12])\.", r"layers.\1.linear\2."),
    # OpenCLIP, and OpenAI's and TinyCLIP's own
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"layers.\1.norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"layers.\1.qkv_proj."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"layers.\1.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"layers.\1.linear1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"layers.\1.linear2."),
    # both
    (r"(?:embeddings\.)?position_embedding\.weight", "position_embedding"),
    (r"positional_embedding", "position_embedding"),
)
"""Names of layers and positions, the same for both towers: pattern, ours."""

_NAMES = (
    *LAYER_NAMES,
    (r"(?:embeddings\.)?token_embedding\.", "token_embedding."),
    (r"(?:final_layer_norm|ln_final)\.", "norm."),
)


def public_name(key: str) -> str | None:
    """Our name of a public checkpoint's key; None for keys of the image encoder.

    Separately stored query, key and value projections keep separate names: `layers.0.q_proj.bias`.

    Raises:
        UserError: a key of an unknown layout.
    """
    name = _PREFIX.sub("", key)
    if _LEFT_OUT.fullmatch(name):
        return None
    if (found := renamed(name, _NAMES)) is not None:
        return found
    raise UserError(f"'{key}' belongs to no CLIP text encoder that is known here")


def renamed(name: str, table: Iterable[tuple[str, str]]) -> str | None:
    """Our name, by the first pattern of `table` that matches the start of `name`; None: none."""
    for pattern, ours in table:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return None


def sanitize(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A public checkpoint's weights under the names of `ClipTextEncoder`.

    Accepts the layouts of Hugging Face's `CLIPModel` and `CLIPTextModel`, OpenCLIP, OpenAI and
    TinyCLIP, with or without the prefixes of wrappers. The image encoder is dropped.

    Raises:
        UserError: a key of another layout.
    """
    named = ((public_name(key), value) for key, value in weights.items())
    return joined({name: value for name, value in named if name is not None})


def joined(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Separate projections of query, key and value as one; `UserError` if one is missing."""
    found = dict(weights)
    for name in [name for name in found if ".q_proj." in name]:
        parts = [name.replace("q_proj", f"{x}_proj") for x in "qkv"]
        if not found.keys() >= set(parts):
            raise UserError(f"'{name}' lacks its keys or values: the checkpoint is incomplete")
        qkv = mx.concatenate([found.pop(part) for part in parts])
        found[name.replace("q_proj", "qkv_proj")] = qkv
    return found


def describe(
    folder: Path, weights: Mapping[str, mx.array]
) -> tuple[TextEncoderConfig, ClipTokenizer]:
    """Sizes and tokenizer of the public CLIP in `folder`, whose `sanitize`d weights are given.

    Sizes are those of the weights; heads and activation are read from config.json or
    open_clip_config.json, the merges from merges.txt, tokenizer.json or OpenCLIP's .txt.gz.

    Raises:
        UserError: files that are missing, damaged or of another network.
    """
    try:
        vocab_size, hidden_size = weights["token_embedding.weight"].shape
        sizes = {
            "kind": "clip",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": len({k.split(".")[1] for k in weights if k.startswith("layers.")}),
            "max_length": weights["position_embedding"].shape[0],
        }
        with naming(folder):
            settings = _heads_and_activation(folder, hidden_size)
            config = from_dict(TextEncoderConfig, sizes | settings)
        tokenizer = ClipTokenizer(_merges(folder, vocab_size), config.max_length)
    except WRONG_KIND as error:
        raise UserError(f"{folder} holds no CLIP text encoder: {error!r}") from None
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the network {vocab_size}"
        )
    return config, tokenizer


def check_is_clip(folder: Path, what: str) -> None:
    """`UserError` for the configs of something else than a CLIP, as far as they say what it is.

    Args:
        what: start of the message.
    """
    path = folder / "config.json"
    names = class_names(read_object(path) if path.is_file() else {})
    if (folder / INDEX).is_file():
        raise UserError(f"{what} is a whole model in diffusers' format")
    if names and "clip" not in names[0].lower():
        raise UserError(f"{what} is a {names[0]}")


def load_clip(folder: Path) -> ClipTextEncoder:
    """A text encoder from a public CLIP in safetensors: Hugging Face's format or OpenCLIP's.

    Raises:
        UserError: files that are missing, damaged or of another network.
    """
    path, weights = read_public(folder, sanitize)
    config, tokenizer = describe(folder, weights)
    encoder = ClipTextEncoder(config, tokenizer)
    check_fit(shapes(weights), shapes(encoder.parameters()), path)
    encoder.update(tree_unflatten(list(weights.items())))
    return encoder


def read_public(
    folder: Path,
    rename: Callable[[Mapping[str, mx.array]], dict[str, mx.array]],
    *,
    convert: str = "python -m convert.from_torch",
) -> tuple[Path, dict[str, mx.array]]:
    """The file of weights of a public CLIP, and its weights under our names.

    Args:
        convert: the command that converts a pickle, for the message.
    """
    names = ("model.safetensors", "open_clip_model.safetensors")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder} has neither {names[0]} nor {names[1]} (weights in a pickle, .bin or .pt, "
            f"are not read here: `{convert}` converts them)"
        )
    try:
        weights = rename(load_weights(path))
        mx.eval(weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    return path, weights


def _heads_and_activation(folder: Path, hidden_size: int) -> dict[str, Any]:
    """The settings that the shapes of the weights do not determine."""
    path = folder / "open_clip_config.json"
    if path.is_file():
        model = read_json(path)
        model = model.get("model_cfg", model)
        text = model.get("text_cfg", {})
        only = {"no_causal_mask": (False,), "embed_cls": (False,), "norm_kwargs": ({},)}
        check_only(text, only | {"act_kwargs": ({},)}, path)
        heads = text.get("heads", hidden_size // 64)
        activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    else:
        text = read_json(folder / "config.json")
        text = text.get("text_config", text)
        check_only(text, {"layer_norm_eps": (1e-5,)}, folder / "config.json")
        # Hugging Face omits values that equal its defaults, which are used here.
        heads = text.get("num_attention_heads", 8)
        activation = text.get("hidden_act", "quick_gelu")
    return {"num_heads": heads, "activation": activation}


def _merges(folder: Path, vocab_size: int) -> bytes:
    """The merges that a vocabulary of this size uses, one per line."""
    lines: list[str] | None = None
    if (path := folder / "merges.txt").is_file():
        lines = read_text(path).split("\n")
    elif (path := folder / "tokenizer.json").is_file():
        merges = read_json(path, most=MOST_BYTES)["model"]["merges"]
        lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    elif path := next(iter(sorted(folder.glob("bpe_simple_vocab*.txt.gz"))), None):
        try:
            with open(path, "rb", opener=open_regular) as packed, gzip.open(packed) as file:
                lines = decode_text(file.read(MOST_BYTES), path).split("\n")[1:]
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged ({error}): get it again") from None
    if lines is None:
        raise UserError(f"{folder} has no tokenizer: neither merges.txt nor tokenizer.json")
    lines = [line for line in lines if line and not line.startswith("#version:")]
    return "\n".join(lines[: vocab_size - 2 * 256 - 2]).encode()
