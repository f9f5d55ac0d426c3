"""New models from an autoencoder and text encoders, and trained models as folders."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint import clip
from mlx_snapgen.checkpoint.hub import find_model, local_folder
from mlx_snapgen.checkpoint.language_models import GEMMA_FILES, GEMMA_TYPES
from mlx_snapgen.checkpoint.model import Components, save_pretrained
from mlx_snapgen.checkpoint.module import EIGHT_BITS, cast, file_matrices, read_part, rounded
from mlx_snapgen.checkpoint.text_encoders import load_source, load_tokenizer, new_text_encoder
from mlx_snapgen.config import ModelConfig, TextEncoderConfig, TransformerConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer
from mlx_snapgen.presets import GEMMA_3_4B
from mlx_snapgen.reading import read_object
from mlx_snapgen.settings import multiples_near

DTYPE = mx.bfloat16
"""Type that the weights of a model folder are stored in."""


def check_converted(folder: Path, source: str | Path | None = None) -> None:
    """`UserError` for a folder in the format of diffusers.

    Args:
        source: its name for messages, such as that of a repository; None: the folder.
    """
    path, config = folder / "config.json", {}
    pipeline = (folder / "model_index.json").is_file()
    if path.is_file():
        try:
            config = read_object(path)
        except UserError:
            return  # the command that reads it reports it
    if pipeline or "_class_name" in config:
        vae = " --subfolder vae" if pipeline else ""
        raise UserError(
            f"{source or folder} is in the format of diffusers: convert it with `python -m "
            f"convert.from_torch {source or folder} --output OUT{vae}`, and give OUT"
        )


# --- text encoders ------------------------------------------------------------------------------


def public_encoder(source: str) -> Any:
    """A public text encoder, CLIP or Gemma; its config refers to its source.

    Args:
        source: folder in the public format, folder of `convert.from_torch`, or repository.

    Raises:
        UserError: no such folder or repository, or another network.
    """
    local = local_folder(source)
    files = tuple(dict.fromkeys((*clip.FILES, *GEMMA_FILES)))
    folder = find_model(source, files=files, check=lambda found: _check_encoder(found, source))
    folder = folder if local is None else local.resolve()
    reference = {
        "source": source if local is None else str(folder),
        # A repository's folder in the cache is named after its commit.
        "revision": folder.name if local is None else None,
    }
    values = _read(folder / "config.json")
    if values.get("model_type") in GEMMA_TYPES:
        with naming(folder / "config.json"):
            config = _gemma_config(values)
        return load_source(folder, dataclasses.replace(config, **reference))
    part = read_part(folder, "text_encoder_0")
    if part is not None:
        with naming(folder / "config.json"):
            config = from_dict(TextEncoderConfig, part.config)
        return load_source(folder, dataclasses.replace(config, **reference))
    encoder = clip.load_clip(folder)
    encoder.config = dataclasses.replace(encoder.config, **reference)
    return encoder


def _check_encoder(folder: Path, source: str) -> None:
    """`UserError` for the configs of something else than a text encoder."""
    check_converted(folder, source)
    values = _read(folder / "config.json")
    if values.get("model_type") not in GEMMA_TYPES and "part" not in values:
        clip.check_is_clip(folder, f"--text-encoder takes a CLIP or a Gemma 3, {source}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError:
        return {}


def _gemma_config(values: Mapping[str, Any]) -> TextEncoderConfig:
    """Sizes of the Gemma of a config.json; those that it omits are the 4B model's."""
    text = values.get("text_config")
    text = text if isinstance(text, dict) else values
    sizes = {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
    }
    found = {ours: text[theirs] for ours, theirs in sizes.items() if theirs in text}
    return from_dict(TextEncoderConfig, dataclasses.asdict(GEMMA_3_4B) | found)


def own_encoder(tokenizer: Path, config: TextEncoderConfig) -> Any:
    """An untrained text encoder of kind "transformer" over the tokens of a sentencepiece file."""
    vocab_size = SentencePieceTokenizer.from_file(tokenizer, config.max_length).vocab_size
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return new_text_encoder(config, load_tokenizer(tokenizer, config))


# --- models -------------------------------------------------------------------------------------


def new_model(
    transformer: TransformerConfig,
    autoencoder: Autoencoder,
    *,
    text_encoders: Sequence[Any],
    **settings: Any,
) -> Components:
    """An untrained model.

    Args:
        transformer: its latent channels and text widths are replaced by those of the other parts.
        settings: other fields of `ModelConfig`.
    """
    transformer = dataclasses.replace(
        transformer,
        latent_channels=autoencoder.config.latent_channels,
        text_dims=tuple(encoder.config.hidden_size for encoder in text_encoders),
    )
    config = ModelConfig(
        transformer=transformer,
        autoencoder=autoencoder.config,
        text_encoders=tuple(encoder.config for encoder in text_encoders),
        **settings,
    )
    check_sides(config.image_size, config.size_unit)
    return Components(
        config=config,
        transformer=EfficientDiT(transformer),
        autoencoder=autoencoder,
        text_encoders=list(text_encoders),
    )


def check_sides(size: tuple[int, int], unit: int) -> None:
    """`UserError` for a model's (height, width) in pixels with a side that is no multiple."""
    if any(side % unit for side in size):
        raise UserError(
            f"pictures of {size[0]}x{size[1]} do not divide by {unit} pixels: choose --resolution "
            f"{multiples_near(max(size), unit)}"
        )


def save_model(
    folder: Path,
    components: Components,
    *,
    bits: int = 0,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder in bfloat16.

    The autoencoder has 8 or 16 bits only if these keep its weights, as after `round_autoencoder`:
    a model's latents do not change once something was trained on them.

    Args:
        bits: of the weights of transformer and own text encoders; 0 does not quantize.
    """
    stored = components.modules()
    autoencoder = stored.pop("autoencoder")
    how = {"bits": bits, "group_size": 32}
    quantize = dict.fromkeys(stored, how) if bits else {}
    for module in stored.values():
        cast(module, DTYPE)
    weights, packed = flat_parameters(autoencoder), packed_weights(autoencoder)
    if packed and all(mx.array_equal(rounded(weights[n]), weights[n]).item() for n in packed):
        quantize["autoencoder"] = EIGHT_BITS
        weights = {name: value for name, value in weights.items() if name not in packed}
    short = {name: value.astype(DTYPE) for name, value in weights.items()}
    if all(mx.array_equal(short[n].astype(v.dtype), v).item() for n, v in weights.items()):
        autoencoder.update(tree_unflatten(list(short.items())))
    save_pretrained(folder, components, quantize=quantize, texts=texts)


def packed_weights(module: nn.Module) -> set[str]:
    """Names of the weights that a quantized file packs."""
    return {f"{name}.weight" for name in file_matrices(module, EIGHT_BITS["group_size"])}


def round_autoencoder(autoencoder: Autoencoder) -> None:
    """Round the weights to 8 bits, or to bfloat16 where there are no groups to pack."""
    packed = packed_weights(autoencoder)
    for name, value in flat_parameters(autoencoder).items():
        value = rounded(value) if name in packed else value.astype(DTYPE).astype(mx.float32)
        autoencoder.update(tree_unflatten([(name, value)]))


def count_weights(module: nn.Module) -> int:
    """Number of weights; those of quantized layers are counted, not their packed words."""
    packed = {
        f"{path}.weight": 32 // layer.bits
        for path, layer in module.named_modules()
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    return sum(
        value.size * packed.get(name, 1)
        for name, value in flat_parameters(module).items()
        if not name.endswith((".scales", ".biases"))
    )
