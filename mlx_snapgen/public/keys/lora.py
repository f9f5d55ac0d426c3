"""LoRAs of any layout, with the keys that `mlx_snapgen.lora.files` writes."""

import functools
import re
from pathlib import Path

from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.lora.files import public_name, read_lora
from mlx_snapgen.lora.peft import CONFIG_KEY, config_beside
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.public.keymap import Weights
from mlx_snapgen.teachers.config import TRANSFORMERS
from mlx_snapgen.teachers.folder import NETWORKS


def lora_name(key: str) -> str:
    """Our name of a public key, including kohya's flat names if the network is known.

    Raises:
        UserError: not a part of a LoRA, or a flat name of an unknown network.
    """
    return public_name(key, dotted)


_NUMBER = r"(?<=[._])\d+(?=[._]|$)"


def dotted(flat: str) -> str | None:
    """Path of a layer whose dots were replaced by underscores; None if no network here has it."""
    path = _layers().get(re.sub(_NUMBER, "#", flat))
    numbers = iter(re.findall(_NUMBER, flat))
    return path and re.sub("#", lambda _: next(numbers), path)


@functools.cache
def _layers() -> dict[str, str]:
    """Flat name -> path of the layers of all networks here, with # for each number."""
    networks = [EfficientDiT(TransformerConfig())]
    networks += [network(TRANSFORMERS[kind](num_layers=1)) for kind, network in NETWORKS.items()]
    paths = {re.sub(_NUMBER, "#", path) for network in networks for path in linear_layers(network)}
    return {path.replace(".", "_"): path for path in paths}


def lora_weights(path: Path, public: Weights) -> Weights:
    """The weights with our keys; `UserError` for a layer with one matrix only."""
    weights = {lora_name(key): value for key, value in public.items()}
    layers = {re.sub(r"\.(lora_[AB]\.weight|alpha)$", "", key) for key in weights}
    for layer in sorted(layers):
        for part in ("lora_A", "lora_B"):
            if f"{layer}.{part}.weight" not in weights:
                raise UserError(f"{path}: {layer} lacks {part}")
    return weights


def lora_metadata(path: Path) -> dict[str, str]:
    """The entries of a file's header that are needed to load it."""
    metadata = {"format": "mlx"} | config_beside(path)
    if path.suffix == ".safetensors":
        _, header = read_lora(path)
        kept = ("base_model", CONFIG_KEY)
        metadata |= {name: value for name, value in header.items() if name in kept}
    return metadata
