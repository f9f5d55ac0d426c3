"""T5 encoders on disk: config.json and spiece.model as published, and weights without a decoder."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.module import (
    Part,
    cast,
    check_quantization,
    dequantize_on_cpu,
    load_stored,
)
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.json_values import check_only, check_positive, from_dict
from mlx_snapgen.networks.text_encoders.base import PromptFormat
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder, T5PromptEncoder, T5Tokenizer
from mlx_snapgen.public_config import T5Config
from mlx_snapgen.reading import read_object

TOKENIZER = "spiece.model"


def t5_config(values: dict[str, Any], path: Path) -> T5Config:
    """Our config from transformers' config.json.

    Args:
        path: of config.json, for messages.

    Raises:
        UserError: another network, or settings that are missing or unsupported.
    """
    if values.get("model_type") != "t5":
        raise UserError(f"{path} describes a {values.get('model_type')}, not a T5")
    gate = values.get("feed_forward_proj", "relu")
    if gate != "gated-gelu":
        raise UserError(f"{path}: only T5 1.1 and FLAN-T5 are supported, with gated-gelu: {gate}")
    only = {"dense_act_fn": ("gelu_new",), "is_gated_act": (True,)}
    check_only(values, only, path)
    names = {
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_layers": "num_layers",
        "num_heads": "num_heads",
        "d_kv": "head_dim",
        "d_ff": "mlp_size",
        "relative_attention_num_buckets": "num_buckets",
        "relative_attention_max_distance": "max_distance",
        "layer_norm_epsilon": "norm_eps",
    }
    found = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    if missing := [name for name in list(names)[:6] if name not in values]:
        raise UserError(f"{path} lacks {missing[0]}")
    with naming(path):
        check_positive(values)
        return from_dict(T5Config, found)


def load_t5(
    folder: Path, prompt_format: PromptFormat, *, dims: int, dtype: mx.Dtype | None = None
) -> T5PromptEncoder:
    """The text encoder in a folder that `convert.from_torch` wrote.

    Args:
        dims: width of the states that the transformer takes.
        dtype: floating type of the weights; None keeps theirs.

    Raises:
        UserError: files that are missing, damaged or do not fit.
    """
    path = folder / "config.json"
    values = read_object(path)
    config = t5_config(values, path)
    if config.hidden_size != dims:
        raise UserError(
            f"{folder} gives states of {config.hidden_size}, the transformer takes those of {dims}"
        )
    tokenizer = T5Tokenizer.from_file(folder / TOKENIZER)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, its network "
            f"{config.vocab_size}"
        )
    how = values.get("quantization")
    if how is not None:
        check_quantization({"text_encoder": how}, ["text_encoder"])
    network = T5Encoder(config)
    load_stored(network, Part((folder / "model.safetensors",), config, how), packed=True)
    dequantize_on_cpu(network)
    cast(network, dtype)
    network.freeze()
    return T5PromptEncoder(network, tokenizer, prompt_format=prompt_format)
