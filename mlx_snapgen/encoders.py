"""Text encoders by kind, from a model's folder or from where their makers published them."""

from pathlib import Path
from typing import Any

from mlx_snapgen import clip, gemma
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.hub import find_model
from mlx_snapgen.text_encoder import Tokenizer, TransformerTextEncoder

STORED = {
    "transformer": (TransformerTextEncoder, Tokenizer),
    "clip": (clip.ClipTextEncoder, clip.ClipTokenizer),
}
"""`TextEncoderConfig.kind` -> encoder and tokenizer of encoders that a model's folder holds."""

KINDS = (*STORED, "gemma")


def make_text_encoder(folder: Path, index: int, config: TextEncoderConfig) -> Any:
    """Encoder `index` of the model in `folder`.

    Its weights are random, for `weights` to load, unless `config.source` says where they are.

    Raises:
        UserError: an unknown kind, or a tokenizer or source that is missing or does not fit.
    """
    if config.kind not in KINDS:
        raise UserError(
            f"{folder / 'config.json'}: unknown text encoder kind '{config.kind}'"
            f"{nearest(config.kind, KINDS)}, known: {', '.join(KINDS)}"
        )
    if config.source is not None:
        return _from_source(folder, config)
    if config.kind not in STORED:
        raise UserError(f"{folder / 'config.json'}: a {config.kind} text encoder needs a source")
    encoder_class, tokenizer_class = STORED[config.kind]
    path = folder / f"tokenizer_{index}.model"
    tokenizer = tokenizer_class.from_file(path, config.max_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, its text encoder {config.vocab_size}"
        )
    return encoder_class(config, tokenizer)


def _from_source(folder: Path, config: TextEncoderConfig) -> Any:
    if config.kind == "gemma":
        return gemma.load_gemma(_find(folder, config, gemma.FILES), config)
    if config.kind == "clip":
        encoder = clip.load_clip(_find(folder, config, clip.FILES))
        if encoder.config.hidden_size != config.hidden_size:
            raise UserError(
                f"{config.source} gives states of {encoder.config.hidden_size}, the model takes "
                f"those of {config.hidden_size}"
            )
        encoder.config = config
        return encoder
    raise UserError(
        f"a {config.kind} text encoder has its weights in the model's folder: no source"
    )


def _find(folder: Path, config: TextEncoderConfig, files: tuple[str, ...]) -> Path:
    """The source's folder: inside the model's, anywhere, or a repository's in the cache."""
    if config.revision is None and (folder / config.source).is_dir():
        return folder / config.source
    return find_model(config.source, config.revision, files)
