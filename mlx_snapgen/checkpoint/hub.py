"""Find a model: a folder, a Hugging Face repository, or the model that comes with the package."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded

BUILT_IN = "stickers"
"""Name of the model that comes with the package."""

MODEL_FILES = ("*.json", "*.safetensors", "*.model")
"""Patterns of the files to download from a model's repository."""

DownloadProgress = Callable[[str, int, int], None]
"""Called with (repository, bytes done, bytes in total), often and from several threads."""


def default_model_path() -> Path:
    """Folder of the model that comes with the package; `UserError` if it is missing."""
    folder = Path(__file__).parents[1] / "models" / BUILT_IN
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the default model is missing ({folder}): reinstall mlx_snapgen, train the model as "
            "described in README.md, or choose another one"
        )
    return folder


def is_built_in(model: str | Path | None) -> bool:
    """Whether `model` means the built-in one: None, or its name if no folder here has that name."""
    if model is None:
        return True
    return str(model) == BUILT_IN and not (Path(BUILT_IN) / "config.json").is_file()


def local_folder(model: str | Path | None) -> Path | None:
    """Folder of a model on this machine, None for the name of a repository.

    Raises:
        UserError: a file, or a built-in model that is missing.
    """
    if is_built_in(model):
        return default_model_path()
    folder = expanded(str(model))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the model's folder")
    return folder if folder.is_dir() else None


def find_model(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    progress: DownloadProgress | None = None,
) -> Path:
    """Folder of a model; a repository is downloaded once and then found in the cache.

    Args:
        model: folder, Hugging Face repository "owner/name", or "stickers" or None for the model
            that comes with the package. A folder of that name in the current directory takes
            precedence if it holds a model.
        revision: branch, tag or commit of a repository; None for its main branch.
        files: patterns of the files to download.
        progress: see `DownloadProgress`; None shows bars on the terminal.

    Raises:
        UserError: no such folder or repository, or offline and not in the cache.
    """
    folder = local_folder(model)
    if folder is not None:
        if revision is not None:
            raise UserError(f"{folder} is a folder: only a Hugging Face repository has revisions")
        return folder
    repo = str(model)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(f"no model folder {repo}")
    return _download(repo, revision=revision, files=files, progress=progress)


def _download(
    repo: str, *, revision: str | None, files: Sequence[str], progress: DownloadProgress | None
) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    shown = {} if progress is None else {"tqdm_class": _reporting_bar(repo, progress)}

    def snapshot(**kwargs: Any) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(files), **shown, **kwargs
            )
        )

    try:
        return snapshot()
    except errors.HFValidationError:
        raise UserError(f"no model folder {repo}, and no name of a repository either") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"the repository {repo} has no revision '{revision}'") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{repo} is gated: ask for access on its page, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{repo} is neither a folder here nor a repository on Hugging Face (a private one "
            "needs `hf auth login`)"
        ) from None
    except Exception as error:
        # The exceptions for a network failure differ between versions of the hub client.
        reason = (str(error).strip().splitlines() or ["no answer"])[0]
        try:
            return snapshot(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            at = f" at revision {revision}" if revision else ""
            raise UserError(
                f"no folder {repo}, and as a Hugging Face repository{at} it is not in the cache "
                f"and cannot be fetched: {type(error).__name__}: {reason}"
            ) from None


def _reporting_bar(repo: str, progress: DownloadProgress) -> type:
    """A progress bar for the hub client that calls `progress` instead of drawing itself."""
    from tqdm import tqdm

    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"file": io.StringIO(), "disable": False})

        def display(self, *_: Any, **__: Any) -> Any:
            nonlocal most
            # Depending on its version, the client has bars for files, bytes received and bytes
            # written.
            if self.unit == "B" and self.total:
                most = max(most, int(self.n))
                progress(repo, most, max(most, int(self.total)))
            return True

    return Bar
