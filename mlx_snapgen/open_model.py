"""Open a model of any kind: one of ours, or a public one."""

from collections.abc import Callable
from pathlib import Path

from mlx_snapgen.checkpoint.config import ModelFolder, load_config
from mlx_snapgen.checkpoint.hub import DownloadProgress, find_model, local_folder, quiet
from mlx_snapgen.checkpoint.language_models import QWEN_FILES
from mlx_snapgen.errors import UserError
from mlx_snapgen.public.first_use import INDEX, describe, is_public, open_public
from mlx_snapgen.settings import ModelChoice
from mlx_snapgen.teachers.folder import CONFIG, TeacherFolder, is_teacher, load_teacher_config

DESCRIPTIONS = ("config.json", CONFIG, INDEX)
"""Files by which a repository is recognized."""

TEACHER_FILES = ("*.json", "*.safetensors", *(f"text_encoder/{name}" for name in QWEN_FILES))


def open_model(
    choice: ModelChoice,
    *,
    progress: DownloadProgress | None = None,
    converting: DownloadProgress | None = None,
    say: Callable[[str], object] | None = None,
) -> ModelFolder | TeacherFolder:
    """Find the model of `choice` and read its config; a public model is fetched and converted.

    A repository is recognized by its configs before any weights are fetched.

    Args:
        progress: see `find_model`.
        converting, say: see `open_public`.

    Raises:
        UserError: no such model, a damaged config, a model that cannot be drawn with, or a stored
            model that cannot be quantized.
    """
    local = local_folder(choice.model)
    if local is not None:
        find_model(choice.model, revision=choice.revision)  # a folder has no revisions
        return _open(choice, local) or (
            open_public(
                describe(str(choice.model), local, None),
                bits=choice.quantize,
                converting=converting,
                say=say,
            )
            if is_public(local)
            else ModelFolder.open(choice.model)
        )
    name = str(choice.model)
    folder = find_model(name, revision=choice.revision, files=DESCRIPTIONS, progress=quiet)
    commit = folder.name
    if is_teacher(folder):
        folder = find_model(name, revision=commit, files=TEACHER_FILES, progress=progress)
        found = _open(choice, folder, commit)
        assert found is not None
        return found
    if is_public(folder):
        model = describe(name, folder, commit)
        return open_public(
            model, bits=choice.quantize, progress=progress, converting=converting, say=say
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is not a model that can be drawn with: it has neither the config.json of this "
            f"package nor {INDEX}"
        )
    return ModelFolder.fetch(name, load_config(folder), commit=commit, progress=progress)


def _open(choice: ModelChoice, folder: Path, commit: str | None = None) -> TeacherFolder | None:
    """The folder that `convert.teacher` wrote; None for any other."""
    if not is_teacher(folder):
        return None
    config = load_teacher_config(folder)
    stored = (config.quantization or {"bits": 0})["bits"]
    if choice.quantize not in (None, stored):
        raise UserError(
            f"{choice.model} is stored with {stored or 'all'} bits per weight: convert it again "
            "with convert.teacher --quantize"
        )
    return TeacherFolder(folder, config, source=choice.model, revision=commit)
