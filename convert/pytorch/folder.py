"""The folder that `convert.to_torch` writes; imports neither torch nor mlx."""

from pathlib import Path

from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.reading import read_object
from mlx_snapgen.settings import parse_width

FORMAT = "mlx_snapgen for PyTorch, 1"


def twin_files(config: ModelConfig) -> list[str]:
    """File names, without suffix, of the networks that have a PyTorch twin."""
    encoders = [
        f"text_encoder_{i}"
        for i, encoder in enumerate(config.text_encoders)
        if encoder.kind == "transformer"
    ]
    decoder = ["decoder"] if config.autoencoder.kind in ("convolutional", "dc-ae") else []
    return ["transformer", *decoder, *encoders]


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The config of the one width in `folder`, and its name; `UserError`: no such folder."""
    try:
        values = read_object(folder / "config.json")
        if values.pop("format", None) != FORMAT:
            raise UserError(f"its format is not '{FORMAT}'")
        width = parse_width(values.pop("width", None)).name
        return from_dict(ModelConfig, values), width
    except UserError as error:
        raise UserError(
            f"{folder} is not a model for PyTorch ({error}): write it with convert.to_torch"
        ) from None
