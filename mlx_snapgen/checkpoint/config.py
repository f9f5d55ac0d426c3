"""A model folder: its config.json, read once, and its vocabulary.json, both checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.hub import (
    DownloadProgress,
    find_model,
    is_built_in,
    local_folder,
    quiet,
)
from mlx_snapgen.checkpoint.module import Part, check_quantization, check_version
from mlx_snapgen.checkpoint.runs import check_is_no_run
from mlx_snapgen.config import ModelConfig, TextEncoderConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.formats import DESCRIPTIONS, describe_foreign
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.reading import read_json


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, ready to be loaded."""

    path: Path
    config: ModelConfig
    source: str | None = None
    """The folder or repository that the user named; None for the built-in model."""
    revision: str | None = None
    """Commit of a repository."""
    sources: dict[TextEncoderConfig, Path] = field(default_factory=dict, repr=False, compare=False)
    """Text encoder -> the folder where its source was found; filled on first use."""

    @classmethod
    def open(
        cls,
        model: "Model" = None,
        *,
        revision: str | None = None,
        progress: DownloadProgress | None = None,
    ) -> "ModelFolder":
        """Find a model and read its config; arguments and errors are those of `find_model`.

        A `ModelFolder` is returned unchanged.

        Raises:
            UserError: also if config.json is missing, foreign or too new; of a repository, before
                the other files are fetched.
        """
        if isinstance(model, ModelFolder):
            return model
        if local_folder(model) is not None:
            path = find_model(model, revision=revision)
            _check_no_packages(path)
            return cls(path, load_config(path), source=None if is_built_in(model) else str(model))
        path = find_model(model, revision=revision, files=DESCRIPTIONS, progress=quiet)
        return cls.fetch(str(model), load_config(path), commit=path.name, progress=progress)

    @classmethod
    def fetch(
        cls, repo: str, config: ModelConfig, *, commit: str, progress: DownloadProgress | None
    ) -> "ModelFolder":
        """Download the rest of a repository whose config is known.

        Args:
            commit: name of the repository's folder in the cache.
            progress: see `find_model`.
        """
        path = find_model(repo, revision=commit, progress=progress)
        return cls(path, config, source=repo, revision=commit)

    @property
    def parts(self) -> dict[str, Part]:
        """Component -> its weights, for each component whose weights are in the folder."""
        config = self.config
        configs: dict[str, Any] = {
            "transformer": config.transformer,
            "autoencoder": config.autoencoder,
        }
        for i, encoder in enumerate(config.text_encoders):
            if encoder.source is None:
                configs[f"text_encoder_{i}"] = encoder
        how: Mapping[str, Any] = config.quantization or {}
        return {
            name: Part((self.path / f"{name}.safetensors",), values, how.get(name))
            for name, values in configs.items()
        }


Model = ModelFolder | str | Path | None
"""An open model, or what `find_model` takes."""


def load_config(folder: Path) -> ModelConfig:
    """`config.json` of a model folder; `UserError` when it is missing, foreign or too new."""
    path = folder / "config.json"
    values = _read_json(path)
    if not isinstance(values, dict) or "format_version" not in values:
        raise _foreign(folder, "config.json has no format_version")
    check_version(folder, values.pop("format_version"))
    with naming(path):
        config = from_dict(ModelConfig, values)
        components = [
            "transformer",
            "autoencoder",
            *(f"text_encoder_{i}" for i in range(len(config.text_encoders))),
        ]
        check_quantization(config.quantization or {}, components)
    dims = tuple(encoder.hidden_size for encoder in config.text_encoders)
    if dims != config.transformer.text_dims:
        raise UserError(
            f"{path}: the text encoders give states of {dims}, the transformer takes "
            f"{config.transformer.text_dims}"
        )
    return config


def _check_no_packages(folder: Path) -> None:
    """`UserError` for Core ML packages without a model beside them."""
    packages = [folder, *folder.glob("*.mlpackage")]
    if packages[-1].suffix == ".mlpackage" and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds Core ML packages, which apps draw with: give the model that "
            "convert.coreml exported"
        )


def load_vocabulary(folder: Path) -> dict[str, Any] | None:
    """The words that a model can draw, by category; None if its folder has no vocabulary.json.

    A category is a list of words, or an object of words and what they mean (see `vocabulary`).
    """
    path = folder / "vocabulary.json"
    if not path.exists():
        return None
    vocabulary = _read_json(path)
    if not isinstance(vocabulary, dict):
        raise UserError(f"{path} must map each category to a list of words")
    for category, words in vocabulary.items():
        mapped = isinstance(words, dict) and category in (*MAPPINGS, "other_words")
        meanings = words.values() if mapped else ()
        good = (mapped or (isinstance(words, list) and category not in MAPPINGS)) and all(
            isinstance(word, str) and word.strip() == word != "" for word in (*words, *meanings)
        )
        if not good:
            what = "map words to words" if category in MAPPINGS else "be a list of words"
            raise UserError(f"{path}: '{category}' must {what}")
    return vocabulary


MAPPINGS = {"emoji", "own_colours", "replaced"}
"""Categories of vocabulary.json that are objects; "other_words" may be one."""


def _read_json(path: Path) -> Any:
    if not path.exists():
        check_is_no_run(path.parent)
        raise _foreign(path.parent, f"no {path.name}")
    return read_json(path)


def _foreign(folder: Path, reason: str) -> UserError:
    what = describe_foreign(folder)
    return UserError(what or f"{folder} is not an mlx_snapgen model: {reason}")
