"""PEFT's config of a LoRA, in the header of its file or beside it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError, one_line
from mlx_snapgen.reading import parse_json, read_object

PEFT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names of the weights in a LoRA's folder: PEFT's and diffusers'."""
PEFT_CONFIG = "adapter_config.json"
CONFIG_KEY = "lora_adapter_metadata"
"""Entry of the header in which diffusers keeps PEFT's config."""
UNSUPPORTED = (
    *("use_dora", "modules_to_save", "layer_replication"),
    *("lora_bias", "trainable_token_indices", "target_parameters", "use_qalora", "fan_in_fan_out"),
    *("alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
"""Settings of PEFT's LoRA that change what the matrices mean."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Starts of PEFT's init_lora_weights that also change the weights of the base."""

MOST_ALPHA = 1e6


def config_beside(path: Path) -> dict[str, str]:
    """The entry of the header for PEFT's config in the folder of the weights; {} without one."""
    beside = path.with_name(PEFT_CONFIG)
    if path.stem != Path(PEFT_FILES[0]).stem or not beside.exists():
        return {}
    return {CONFIG_KEY: json.dumps(read_object(beside))}


def peft_config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config (see `CONFIG_KEY`), or {}; `UserError` for a variant of LoRA."""
    try:
        config = parse_json(header.get(CONFIG_KEY, "{}"), path)
    except UserError as error:
        raise UserError(f"{path} has a damaged header ({error}): get it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has a damaged header: get it again")
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    if (kind := config.get("peft_type")) not in (None, "LORA"):
        raise UserError(f"{path} is an adapter of the kind '{kind}', only LORA is supported")
    for key in UNSUPPORTED:
        if config.get(key):
            raise UserError(f"{path} is a LoRA with '{key}', which is not supported")
    if (how := str(config.get("init_lora_weights")).lower()).startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{path} belongs to a base that '{one_line(how, 40)}' has changed: merge it "
            "with PEFT, or save it again with path_initial_model_for_weight_conversion"
        )
    return config


def peft_alphas(
    path: Path, config: Mapping[str, Any], ranks: Mapping[str, int]
) -> dict[str, float]:
    """The alpha of each layer, such that alpha / rank is the factor of PEFT's config."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    known = [] if alpha is None else [alpha]
    known += patterns.values() if isinstance(patterns, dict) else [None]
    if not all(type(value) in (int, float) and abs(value) < MOST_ALPHA for value in known):
        raise UserError(f"{path} has a damaged header: its lora_alpha is no number: get it again")
    alphas = {layer: rank if alpha is None else alpha for layer, rank in ranks.items()}
    # The first pattern that matches a layer counts.
    for pattern, value in reversed(patterns.items()):
        # PEFT's patterns are regular expressions; diffusers writes the ends of paths.
        end = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        matched = [layer for layer in ranks if f".{layer}".endswith(f".{end}")]
        if not matched:
            raise UserError(f"{path} has an alpha for '{pattern}', which is none of its layers")
        alphas |= dict.fromkeys(matched, value)
    if config.get("use_rslora"):
        alphas = {layer: value * math.sqrt(ranks[layer]) for layer, value in alphas.items()}
    return {layer: float(value) for layer, value in alphas.items()}
