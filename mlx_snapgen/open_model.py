"""Open a model of any kind: one of ours, or a public one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_snapgen.checkpoint.config import ModelFolder, load_config
from mlx_snapgen.checkpoint.hub import DownloadProgress, find_model, local_folder, quiet
from mlx_snapgen.checkpoint.language_models import TEXT_FILES
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, of_settings
from mlx_snapgen.files import expanded
from mlx_snapgen.formats import DESCRIPTIONS, INDEX, is_public, is_teacher
from mlx_snapgen.lora.adapters import remove_lora
from mlx_snapgen.lora.files import load_lora, read_lora
from mlx_snapgen.lora.things import check_thing, read_thing
from mlx_snapgen.settings import BUILT_IN, DrawSettings, ModelChoice, check_choice
from mlx_snapgen.tensor_files import read_header

# The modules of public models are imported when there is one: they take longer than all others.
if TYPE_CHECKING:
    from mlx_snapgen.public.description import PublicModel
    from mlx_snapgen.teachers.folder import TeacherFolder

TEACHER_FILES = ("*.json", "*.safetensors", *(f"text_encoder/{name}" for name in TEXT_FILES))


def open_model(
    choice: ModelChoice,
    *,
    settings: DrawSettings | None = None,
    progress: DownloadProgress | None = None,
    converting: DownloadProgress | None = None,
    say: Callable[[str], object] | None = None,
) -> "ModelFolder | TeacherFolder":
    """Find the model of `choice` and read its config; a public model is fetched and converted.

    A repository is recognized by its configs before any weights are fetched. So is a LoRA that is
    missing, or does not fit a public model.

    Args:
        settings: checked before a model is fetched, as `choice` is; None: not known yet.
        progress: see `find_model`.
        converting, say: see `open_public`.

    Raises:
        UserError: no such model, a damaged config, a model that cannot be drawn with, or a stored
            model that cannot be quantized.
    """
    for path, _ in choice.loras:
        read_lora(path)
    if choice.base is not None or is_file(choice.model):
        model = describe_file(choice.model or BUILT_IN, base=choice.base, revision=choice.revision)
        return _open_public(
            model, choice, settings=settings, progress=progress, converting=converting, say=say
        )
    folder, commit = _described(choice.model, choice.revision)
    name = str(choice.model)
    if is_teacher(folder):
        from mlx_snapgen.teachers.folder import load_teacher_config

        _check(load_teacher_config(folder), choice, settings=settings)
        if commit is not None:
            folder = find_model(name, revision=commit, files=TEACHER_FILES, progress=progress)
        return _open(choice, folder, commit)
    if is_public(folder):
        model = _describe(name, folder, commit)
        return _open_public(
            model, choice, settings=settings, progress=progress, converting=converting, say=say
        )
    if commit is None:
        found = ModelFolder.open(choice.model)
        _check(found.config, choice, settings=settings)
        return found
    config = _own_config(name, folder)
    _check(config, choice, settings=settings)
    return ModelFolder.fetch(name, config, commit=commit, progress=progress)


def _own_config(name: str, folder: Path) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is not a model that can be drawn with: it has neither the config.json of this "
            f"package nor {INDEX}"
        )
    return load_config(folder)


def describe_model(choice: ModelChoice) -> Description:
    """The config of the model of `choice`; of a repository, its configs alone are fetched.

    Raises:
        UserError: no such model, or a damaged config.
    """
    if choice.base is not None or is_file(choice.model):
        model = choice.model or BUILT_IN
        return describe_file(model, base=choice.base, revision=choice.revision).config
    folder, commit = _described(choice.model, choice.revision)
    if is_teacher(folder):
        from mlx_snapgen.teachers.folder import load_teacher_config

        return load_teacher_config(folder)
    if is_public(folder):
        return _describe(str(choice.model), folder, commit).config
    if commit is None:
        return ModelFolder.open(choice.model).config
    return _own_config(str(choice.model), folder)


def find_description(choice: ModelChoice) -> Path:
    """Folder with the config of the model of `choice`, and its vocabulary if it has one.

    Raises:
        UserError: as `open_model`; a public model is not fetched.
    """
    if choice.base is None and not is_file(choice.model):
        folder, _ = _described(choice.model, choice.revision)
        return folder if is_teacher(folder) or is_public(folder) else open_model(choice).path
    model = choice.model or BUILT_IN
    return describe_file(model, base=choice.base, revision=choice.revision).folder


BASES = {
    "z-image": "Tongyi-MAI/Z-Image-Turbo or Tongyi-MAI/Z-Image",
    "qwen-image": "Qwen/Qwen-Image",
    "flux2": "black-forest-labs/FLUX.2-klein-4B or black-forest-labs/FLUX.2-klein-base-4B",
}
"""Kind of a public model -> repositories that a single file can have its other parts from."""


def is_file(model: str | None) -> bool:
    """Whether a model is the name of one file, there or not."""
    return str(model).endswith(".safetensors") and not expanded(str(model)).is_dir()


def _described(model: str | None, revision: str | None) -> tuple[Path, str | None]:
    """Folder of a model's configs, and the commit if it is of a repository."""
    folder = find_model(model, revision=revision, files=DESCRIPTIONS, progress=quiet)
    return folder, folder.name if local_folder(model) is None else None


def describe_public(model: str, *, revision: str | None, base: str | None) -> "PublicModel":
    """A public model in diffusers' format, or one file of it; see `describe_file`.

    Raises:
        UserError: another model, from its configs alone.
    """
    if base is not None or is_file(model):
        return describe_file(model, base=base, revision=revision)
    folder, commit = _described(model, revision)
    if not is_public(folder):
        raise UserError(f"{model} is not in diffusers' format: it has no {INDEX}")
    return _describe(model, folder, commit)


def _describe(source: str, folder: Path, commit: str | None) -> "PublicModel":
    from mlx_snapgen.public.description import describe

    return describe(source, folder, commit)


def describe_file(file: str, *, base: str | None, revision: str | None) -> "PublicModel":
    """The public model whose transformer is one file, and whose other parts are those of `base`.

    Args:
        base: folder in diffusers' format, or repository.
        revision: of the repository.

    Raises:
        UserError: no such file, a file of something else, or no `base`.
    """
    path = expanded(file)
    if path.suffix != ".safetensors" or not path.is_file():
        what = "--base takes a model that is one .safetensors file, not" if base else "no file"
        raise UserError(f"{what} {file}")
    from mlx_snapgen.public.layouts import kind_of

    kind = kind_of(read_header(path)[0])
    if kind is None:
        raise UserError(f"{file} is no transformer of a public model that can be drawn with")
    if base is None:
        raise UserError(
            f"{file} is a transformer alone: choose the model with the other parts, --base "
            f"{BASES[kind]}"
        )
    folder, commit = _described(base, revision)
    if not is_public(folder):
        raise UserError(f"{base} is not in diffusers' format: choose --base {BASES[kind]}")
    model = _describe(base, folder, commit)
    if model.kind != kind:
        raise UserError(f"{file} is not of {model.name}'s kind: choose --base {BASES[kind]}")
    return dataclasses.replace(model, file=path)


def _open_public(
    model: "PublicModel",
    choice: ModelChoice,
    *,
    settings: DrawSettings | None,
    progress: DownloadProgress | None,
    converting: DownloadProgress | None,
    say: Callable[[str], object] | None,
) -> "TeacherFolder":
    """See `open_public`; before it, `UserError` for what the model does not support, or a LoRA of
    `choice` that does not fit the network."""
    from mlx_snapgen.public.first_use import open_public

    settings = _check(model.config, choice, settings=settings)
    for path, _ in choice.loras:
        load_lora(path, model.network, name="fitting")
        remove_lora(model.network)
    return open_public(
        model, choice, settings=settings, progress=progress, converting=converting, say=say
    )


def _check(
    config: Description, choice: ModelChoice, *, settings: DrawSettings | None
) -> DrawSettings | None:
    """Resolved settings; `UserError` for what the model of `config` does not support."""
    for path, _ in choice.loras:
        if (thing := read_thing(path, read_lora(path)[1])) is not None:
            parts = getattr(config, "autoencoder", None)
            check_thing(path, thing, getattr(parts, "semantics", None))
    with of_settings():
        check_choice(config, choice)
        return settings and settings.resolved(config)


def _open(choice: ModelChoice, folder: Path, commit: str | None) -> "TeacherFolder":
    """The folder that `convert.teacher` wrote."""
    from mlx_snapgen.teachers.folder import TeacherFolder, load_teacher_config

    config = load_teacher_config(folder)
    stored = (config.quantization or {"bits": 0})["bits"]
    if choice.quantize not in (None, stored):
        raise UserError(
            f"{choice.model} is stored with {stored or 'all'} bits per weight: convert it again "
            "with convert.teacher --quantize"
        )
    return TeacherFolder(folder, config, source=choice.model, revision=commit)
