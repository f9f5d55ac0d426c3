"""A model's text encoders: loaded by kind, freed after encoding, with a cache of embeddings."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint import clip
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.hub import DownloadProgress, find_model, of_text_encoder
from mlx_snapgen.checkpoint.language_models import GEMMA_FILES, load_gemma
from mlx_snapgen.checkpoint.module import Part, load_stored, read_part
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, naming, nearest
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import Prompt, TextStates, encode_states
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.networks.text_encoders.sentencepiece import (
    SentencePieceTokenizer,
    TransformerTextEncoder,
)

STORED = {
    "transformer": (TransformerTextEncoder, SentencePieceTokenizer),
    "clip": (ClipTextEncoder, ClipTokenizer),
}
"""`TextEncoderConfig.kind` -> classes of encoder and tokenizer, for weights in the model folder."""

KINDS = (*STORED, "gemma")

SOURCE_FILES = {"clip": clip.FILES, "gemma": GEMMA_FILES}
"""`TextEncoderConfig.kind` -> files to download if `TextEncoderConfig.source` is a repository."""


def load_text_encoder(model: ModelFolder, index: int) -> Any:
    """Text encoder `index` of a model, its weights lazy.

    Raises:
        UserError: an unknown kind, or a file that is missing, damaged or does not fit.
    """
    config = model.config.text_encoders[index]
    if config.kind not in KINDS:
        raise UserError(
            f"{model.path / 'config.json'}: unknown text encoder kind '{config.kind}'"
            f"{nearest(config.kind, KINDS)}, known: {', '.join(KINDS)}"
        )
    if config.source is not None:
        if config.kind not in SOURCE_FILES:
            raise UserError(
                f"a {config.kind} text encoder has its weights in the model's folder: no source"
            )
        return load_source(_find(model, config), config)
    path = model.path / f"tokenizer_{index}.model"
    return _load_stored(path, config, model.parts[f"text_encoder_{index}"])


def _load_stored(tokenizer: Path, config: TextEncoderConfig, part: Part) -> Any:
    encoder = new_text_encoder(config, load_tokenizer(tokenizer, config))
    load_stored(encoder, part)
    return encoder


def load_tokenizer(path: Path, config: TextEncoderConfig) -> Any:
    """The tokenizer in a file, of the kind that `config` names.

    Raises:
        UserError: a kind that has no such file, or one that is missing, damaged or too large.
    """
    tokenizer = _stored_classes(config)[1].from_file(path, config.max_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, its text encoder {config.vocab_size}"
        )
    return tokenizer


def new_text_encoder(config: TextEncoderConfig, tokenizer: Any) -> Any:
    """An encoder with random weights; `UserError` for a kind that is only loaded from a source."""
    return _stored_classes(config)[0](config, tokenizer)


def _stored_classes(config: TextEncoderConfig) -> tuple[type, type]:
    if config.kind not in STORED or config.source is not None:
        raise UserError(
            f"a {config.kind} text encoder is loaded from its source, not with the model's own "
            "weights"
        )
    return STORED[config.kind]


def load_source(folder: Path, config: TextEncoderConfig) -> Any:
    """The text encoder of `config` ("clip" or "gemma"), whose source is `folder`.

    Raises:
        UserError: files that are missing, damaged or do not fit.
    """
    if config.kind == "gemma":
        return load_gemma(folder, config)
    encoder = _load_clip(folder)
    if encoder.config.hidden_size != config.hidden_size:
        raise UserError(
            f"{config.source} gives states of {encoder.config.hidden_size}, the model takes "
            f"those of {config.hidden_size}"
        )
    encoder.config = config
    return encoder


def _load_clip(folder: Path) -> ClipTextEncoder:
    """A CLIP in a public layout, or one that `convert.from_torch` made."""
    part = read_part(folder, "text_encoder_0")
    if part is None:
        return clip.load_clip(folder)
    with naming(folder / "config.json"):
        config = from_dict(TextEncoderConfig, part.config)
    if config.kind != "clip":
        raise UserError(f"{folder} holds a {config.kind} text encoder, not a CLIP")
    return _load_stored(folder / "tokenizer_0.model", config, part)


def _find(
    model: ModelFolder, config: TextEncoderConfig, progress: DownloadProgress | None = None
) -> Path:
    """Folder of an encoder's source: inside the model folder, elsewhere, or downloaded."""
    assert config.source is not None
    if config not in model.sources:
        inside = model.path / config.source
        named = f"its source in {model.path.name}/config.json"
        with of_text_encoder(model.path, named=named):
            model.sources[config] = (
                inside
                if config.revision is None and inside.is_dir()
                else find_model(
                    config.source,
                    revision=config.revision,
                    files=SOURCE_FILES[config.kind],
                    progress=progress,
                )
            )
    return model.sources[config]


def download_sources(model: ModelFolder, progress: DownloadProgress) -> None:
    """Download the text encoders whose source is a repository."""
    for config in model.config.text_encoders:
        if config.source is not None and config.kind in SOURCE_FILES:
            _find(model, config, progress)


def encoder_names(configs: Sequence[TextEncoderConfig]) -> list[str]:
    """The name of each encoder in options: its kind, with a number if the kind occurs twice."""
    kinds = [config.kind for config in configs]
    return [k if kinds.count(k) == 1 else f"{k}-{i}" for i, k in enumerate(kinds)]


def chosen_encoders(
    configs: Sequence[TextEncoderConfig], names: Sequence[str] | None
) -> list[bool]:
    """Whether each encoder is in `names` (None: all); `UserError` for an unknown name."""
    known = encoder_names(configs)
    for name in known if names is None else names:
        if name not in known:
            raise UserError(
                f"this model has no text encoder '{name}'{nearest(str(name), known)}, only "
                + ", ".join(known)
            )
    if names is not None and not names:
        raise UserError(f"choose at least one text encoder of {', '.join(known)}")
    return [names is None or name in names for name in known]


class PromptEncoder:
    """Loads text encoders on demand, frees them after encoding, caches embeddings.

    Prompts are encoded one by one, so that a prompt's states do not depend on the cache.

    Args:
        encoders: None for an absent encoder.
        reload: loads the encoders again after `free`; without it they stay in memory.
        cache_size: number of prompts whose states are kept; the most recently used ones.
    """

    def __init__(
        self,
        encoders: list[Any],
        reload: Callable[[], list[Any]] | None = None,
        *,
        cache_size: int = 32,
    ):
        self._encoders: list[Any] | None = encoders
        self._reload, self._cache_size = reload, cache_size
        self._cache: OrderedDict[Prompt, list[TextStates | None]] = OrderedDict()
        self.tokenizers = [getattr(e, "tokenizer", None) for e in encoders]

    @property
    def encoders(self) -> list[Any]:
        """The encoders, loaded again if they were freed."""
        if self._encoders is None:
            assert self._reload is not None
            self._encoders = self._reload()
        return self._encoders

    def __call__(
        self, prompts: Sequence[Prompt], transformer: EfficientDiT
    ) -> tuple[mx.array, mx.array]:
        """See `encode_prompts`."""
        found = []
        for prompt in prompts:
            if prompt not in self._cache:
                states = encode_states([prompt], self.encoders, dtype=transformer.dtype)
                mx.eval(*(s for s in states if s is not None))
                self._cache[prompt] = states
            self._cache.move_to_end(prompt)
            found.append(self._cache[prompt])
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        joined: list[TextStates | None] = []
        for parts in zip(*found, strict=True):
            present = [part for part in parts if part is not None]
            joined.append(_joined(present) if present else None)
        return transformer.encode_text(joined)

    def free(self) -> None:
        """Free the encoders' memory if they can be loaded again."""
        if self._reload is not None and self._encoders is not None:
            self._encoders = None
            mx.clear_cache()


def _joined(parts: Sequence[TextStates]) -> TextStates:
    """The states of several prompts as one batch."""
    return TextStates(
        mx.concatenate([part.states for part in parts]),
        mx.concatenate([part.mask for part in parts]),
    )
