"""What a public model is, from its configs alone."""

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_snapgen.checkpoint.hub import find_model, local_folder, quiet
from mlx_snapgen.checkpoint.t5 import t5_config
from mlx_snapgen.errors import UserError
from mlx_snapgen.formats import INDEX, PIPELINES, find_minit2i
from mlx_snapgen.json_values import check_sizes
from mlx_snapgen.presets import FLUX2_AUTOENCODER, PIXELS
from mlx_snapgen.public.keys.transformers import make_transformer
from mlx_snapgen.public.teachers import read_schedules
from mlx_snapgen.reading import read_object
from mlx_snapgen.teachers.config import TeacherConfig
from mlx_snapgen.teachers.folder import PROMPT_FORMATS, TeacherNetwork

FLAN_T5 = r"google/flan-t5-[a-z]+"
"""Names of that repository."""

CONFIGS = (
    INDEX,
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
"""Files that describe a model."""

MINIT2I_CONFIGS = "transformer/config.json", "scheduler/scheduler_config.json"
TEXT_CONFIG = "config.json"
TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class Place:
    """Where files are."""

    source: str
    """The name of the folder or repository."""
    folder: Path
    """Where its configs are; of a local one also its weights."""
    commit: str | None
    """Of a repository; None for a local folder."""


@dataclass(frozen=True)
class PublicModel(Place):
    """A model in diffusers' format, described by its configs alone; `source` is the user's name."""

    config: TeacherConfig
    """Of an autoencoder in general: its own config needs its weights."""
    network: TeacherNetwork
    """With lazy random weights."""
    file: Path | None = None
    """File with the transformer, instead of that in the folder or repository."""
    inside: str = ""
    """Folder of the model in the folder or repository, ending in /."""
    text: Place | None = None
    """Where the text encoder is, unless it is in the model's folder."""

    @property
    def kind(self) -> str:
        """See `TeacherConfig.kind`."""
        return self.config.kind

    @property
    def name(self) -> str:
        """See `Description.name`."""
        return self.config.name


def describe(source: str, folder: Path, commit: str | None) -> PublicModel:
    """A model, from its configs in `folder`.

    Raises:
        UserError: a model that cannot be drawn with, a config that is missing, or no mlx-lm, which
            all known models except MiniT2I need.
    """
    if (inside := find_minit2i(folder)) is not None:
        return _describe_minit2i(Place(source, folder, commit), inside)
    if importlib.util.find_spec("mlx_lm") is None:
        raise UserError('public models need mlx-lm: pip install "mlx_snapgen[public]"')
    name = read_object(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        raise UserError(
            f"{source} is a {name}, which cannot be drawn with: known are {', '.join(PIPELINES)}, "
            "and MiniT2I"
        )
    if commit is not None:
        folder = find_model(source, revision=commit, files=CONFIGS, progress=quiet)
    path = folder / "transformer" / "config.json"
    kind, network = make_transformer(read_object(path), path)
    path = folder / "text_encoder" / "config.json"
    values = read_object(path)
    check_sizes(values, path)
    text = values.get("model_type")
    if text not in PROMPT_FORMATS[kind].model_types:
        raise UserError(f"{source} has a {text} as text encoder, which does not fit a {kind}")
    config = _config(kind, network, folder)
    return PublicModel(source, folder, commit, config=config, network=network)


def _config(kind: str, network: TeacherNetwork, folder: Path) -> TeacherConfig:
    """The config of a model whose schedule is in `folder`."""
    schedule, few_step = read_schedules(folder, network, has_few_step=False)
    autoencoder = PIXELS
    if kind != "minit2i":
        # All known ones make a latent of 8 x 8 pixels.
        channels = network.config.latent_channels
        autoencoder = replace(FLUX2_AUTOENCODER, latent_channels=channels)
    return TeacherConfig(kind, network.config, autoencoder, schedule=schedule, few_step=few_step)


def _describe_minit2i(place: Place, inside: str) -> PublicModel:
    """MiniT2I, whose text encoder is in its folder, or in a repository that its config names."""
    if place.commit is not None:
        files = [inside + name for name in MINIT2I_CONFIGS]
        find_model(place.source, revision=place.commit, files=files, progress=quiet)
    folder = place.folder / inside
    path = folder / "transformer" / "config.json"
    values = read_object(path)
    kind, network = make_transformer(values, path)
    text, where = None, folder / TEXT_ENCODER
    is_own = place.commit is None and where.is_dir() and any(where.glob("[!.]*"))
    if is_own and not (where / TEXT_CONFIG).exists():
        missing = f"{inside}{TEXT_ENCODER}/{TEXT_CONFIG}"
        raise UserError(f"{place.source} is incomplete: it has no {missing}")
    if not is_own and not (where / TEXT_CONFIG).is_file():
        name = values.get("llm")
        if not isinstance(name, str) or not re.fullmatch(FLAN_T5, name):
            raise UserError(f"{path} names {name!r} as text encoder, which is no FLAN-T5")
        where = find_model(name, files=[TEXT_CONFIG], progress=quiet)
        text = Place(name, where, where.name if local_folder(name) is None else None)
    path_of_text = where / TEXT_CONFIG
    if t5_config(read_object(path_of_text), path_of_text).hidden_size != network.config.text_dims:
        raise UserError(f"{where} does not fit {path}: its states have another width")
    return PublicModel(
        place.source,
        place.folder,
        place.commit,
        config=_config(kind, network, folder),
        network=network,
        inside=inside,
        text=text,
    )
