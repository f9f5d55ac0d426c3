"""Finding a model: a folder, a Hugging Face repository, or the one that comes with the package."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError


def default_model_path() -> Path:
    """Folder of the model that comes with the package; `UserError` when it is not there."""
    folder = Path(__file__).parents[1] / "models" / "stickers"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the default model is missing ({folder}): reinstall mlx_snapgen, train the model as "
            "its README.md tells, or name another one"
        )
    return folder


MODEL_FILES = ("*.json", "*.safetensors", "*.model")
"""What is downloaded of a model's repository."""

DownloadProgress = Callable[[str, int, int], None]
"""Told (repository, bytes done, bytes in all as far as known), often and from several threads."""


def find_model(
    path_or_repo: str | Path | None = None,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    progress: DownloadProgress | None = None,
) -> Path:
    """Folder of a model; a repository is downloaded once and then found in the cache.

    Args:
        path_or_repo: folder, Hugging Face repository "owner/name", or None for the default model.
        revision: branch, tag or commit of a repository; None for its main branch.
        files: patterns of the files to download.
        progress: see `DownloadProgress`; None shows bars on the terminal.

    Raises:
        UserError: no such folder or repository, or offline and not in the cache.
    """
    folder = default_model_path() if path_or_repo is None else Path(path_or_repo).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"{folder} is a folder: only a Hugging Face repository has revisions")
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file: give the model's folder")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path_or_repo)):
        raise UserError(f"no model folder {path_or_repo}")
    return _download(str(path_or_repo), revision, files, progress)


def _download(
    repo: str, revision: str | None, files: Sequence[str], progress: DownloadProgress | None
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
        # Each version of the hub client has its own exceptions for a network that fails.
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
    """A progress bar for the hub client that tells `progress` instead of drawing itself."""
    from tqdm import tqdm

    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs | {"file": io.StringIO(), "disable": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            nonlocal most
            # Versions of the client count files, bytes received and bytes written, each in a bar.
            if self.unit == "B" and self.total:
                most = max(most, int(self.n))
                progress(repo, most, max(most, int(self.total)))
            return True

    return Bar
