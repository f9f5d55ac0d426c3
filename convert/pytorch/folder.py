"""The folder that `convert.to_torch` writes; imports neither torch nor mlx."""

import json
from pathlib import Path

from mlx_snapgen.config import ModelConfig, from_dict
from mlx_snapgen.errors import UserError

FORMAT = "mlx_snapgen for PyTorch, 1"


def twin_files(config: ModelConfig) -> list[str]:
    """File names, without suffix, of the networks that have a PyTorch twin."""
    encoders = [
        f"text_encoder_{i}"
        for i, encoder in enumerate(config.text_encoders)
        if encoder.kind == "transformer"
    ]
    decoder = ["decoder"] if config.autoencoder.kind == "convolutional" else []
    return ["transformer", *decoder, *encoders]


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The config of the one width in `folder`, and its name; `UserError`: no such folder."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise KeyError("format")
        width = values.pop("width")
        return from_dict(ModelConfig, values), width
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} is not a model for PyTorch ({error!r}): write it with convert.to_torch"
        ) from None
