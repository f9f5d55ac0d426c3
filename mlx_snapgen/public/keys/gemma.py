"""Gemma 3's text network in mlx-lm's format: config, shapes and keys."""

from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.language_models import GEMMA_TYPES, gemma_text
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import check_sizes
from mlx_snapgen.public.keymap import KeyMap, Row, numberless

GEMMA_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files that mlx-lm reads besides weights and config.json."""


def gemma_config(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """config.json of the text network only, with the names that mlx-lm reads.

    Raises:
        UserError: another network, a setting that is not supported, or sizes that are missing or
            out of range.
    """
    check_sizes(values, path)
    if values.get("model_type") not in GEMMA_TYPES:
        raise UserError(f"{path} describes a {values.get('model_type')}, not a Gemma 3")
    if values.get("quantization") or values.get("quantization_config"):
        raise UserError(f"{path} describes quantized weights: get the original ones")
    text = gemma_text(values, path)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        if key not in text:
            raise UserError(f"{path} lacks {key}: it does not describe a Gemma 3")
    return text


def gemma_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the network that `gemma_config` describes."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", 256)
    queries = config.get("num_attention_heads", 4) * head
    keys = config.get("num_key_value_heads", 1) * head
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    } | {
        f"{name}_layernorm": (width,)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    }
    return {
        "model.embed_tokens.weight": (config.get("vocab_size", 262144), width),
        "model.norm.weight": (width,),
    } | {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }


def _rows() -> list[Row]:
    sizes = {"hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1}
    names = numberless(gemma_shapes(sizes))
    # With or without the vision tower, in the layouts of several versions of transformers.
    prefixes = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
    return [
        Row(prefix + name.removeprefix("model."), name) for prefix in prefixes for name in names
    ]


GEMMA_KEYS = KeyMap(
    "Gemma 3",
    Row("vision_tower|multi_modal_projector.**", None),
    Row("model.vision_tower|multi_modal_projector.**", None),
    # The encoder returns states.
    Row("lm_head.weight", None),
    Row("language_model.lm_head.weight", None),
    *_rows(),
)
