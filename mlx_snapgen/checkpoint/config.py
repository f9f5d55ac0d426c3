"""A model folder's config.json and vocabulary.json, checked."""

import json
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.module import FORMAT_VERSION, check_quantization
from mlx_snapgen.config import ModelConfig, from_dict
from mlx_snapgen.errors import UserError


def load_config(folder: Path) -> ModelConfig:
    """`config.json` of a model folder; `UserError` when it is missing, foreign or too new."""
    path = folder / "config.json"
    values = _read_json(path)
    if not isinstance(values, dict) or "format_version" not in values:
        raise UserError(f"{folder} is not an mlx_snapgen model: config.json has no format_version")
    version = values.pop("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format version {version}, this mlx_snapgen reads {FORMAT_VERSION}: "
            "upgrade it"
        )
    try:
        config = from_dict(ModelConfig, values)
        quantization = config.quantization or {}
        check_quantization(
            quantization,
            ["transformer", "autoencoder"]
            + [f"text_encoder_{i}" for i in range(len(config.text_encoders))],
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a value of the wrong kind: {error}") from None
    dims = tuple(encoder.hidden_size for encoder in config.text_encoders)
    if dims != config.transformer.text_dims:
        raise UserError(
            f"{path}: the text encoders give states of {dims}, the transformer takes "
            f"{config.transformer.text_dims}"
        )
    return config


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not an mlx_snapgen model: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def load_vocabulary(folder: Path) -> dict[str, list[str]] | None:
    """The words a model knows, by category, or None when its folder does not say."""
    path = folder / "vocabulary.json"
    if not path.exists():
        return None
    vocabulary = _read_json(path)
    good = isinstance(vocabulary, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in vocabulary.values()
    )
    if not good:
        raise UserError(f"{path} must map each category to a list of words")
    return vocabulary
