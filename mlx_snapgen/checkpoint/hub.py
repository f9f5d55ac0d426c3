"""Find a model: a folder, a Hugging Face repository, or the model that comes with the package."""

import contextlib
import glob
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError, show_as
from mlx_snapgen.files import check_link, expanded
from mlx_snapgen.formats import DESCRIPTIONS
from mlx_snapgen.settings import BUILT_IN, FORMER

MODEL_FILES = ("*.json", "*.safetensors", "*.model")
"""Patterns of the files to download from a model's repository."""

DownloadProgress = Callable[[str, int, int], None]
"""Called with (repository, bytes done, bytes in total), often and from several threads."""


def quiet(name: str, done: int, total: int) -> None:
    """A `DownloadProgress` that shows nothing, for small files."""


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
    check_link(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give the model's folder")
    return folder if folder.is_dir() else None


def find_model(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    progress: DownloadProgress | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Folder of a model; a repository is downloaded once and then found in the cache.

    Args:
        model: folder, Hugging Face repository "owner/name", or `BUILT_IN` or None for the model
            that comes with the package. A folder of that name in the current directory takes
            precedence if it holds a model.
        revision: branch, tag or commit of a repository; None for its main branch.
        files: patterns of the files to download.
        progress: see `DownloadProgress`; None shows bars on the terminal.
        check: is called with the folder, of a repository before its `files` are downloaded: it then
            has `DESCRIPTIONS`.

    Raises:
        UserError: no such folder or repository, or offline and not in the cache.
    """
    folder = local_folder(model)
    if folder is not None:
        if revision is not None:
            raise UserError(f"{folder} is a folder: only a Hugging Face repository has revisions")
        if check is not None:
            check(folder)
        return folder
    repo = str(model)
    name = r"[\w-][\w.-]*/[\w-][\w.-]*"
    if found := re.match(rf"https?://(?:huggingface\.co|hf\.co)/({name})", repo):
        raise UserError(f"no model folder {repo}: give the repository as {found[1]}")
    if not re.fullmatch(name, repo):
        before = (
            f": the built-in model is {BUILT_IN} now (--model also takes the folder "
            f"mlx_snapgen/models/{repo} of an earlier version)"
            if repo in FORMER
            else ""
        )
        raise UserError(f"no model folder {repo}{before}")
    if check is not None:
        described = _download(repo, revision=revision, files=DESCRIPTIONS, progress=quiet)
        check(described)
        revision = described.name
    return _download(repo, revision=revision, files=files, progress=progress)


@contextlib.contextmanager
def of_text_encoder(model: Path, *, named: str) -> Iterator[None]:
    """A `UserError` in this context is about the text encoder of a model; `named` is where the
    model's folder names its place."""
    try:
        yield
    except UserError as error:
        moved = f"; if it was moved, change {named}"
        raise UserError(f"the text encoder of {model}: {error}{moved}") from None


@dataclass(frozen=True)
class Repository:
    """What a Hugging Face repository has, without its files."""

    files: dict[str, int]
    """Name -> bytes."""
    license: str | None


def read_repository(repo: str, revision: str | None = None) -> Repository | None:
    """The files of a repository at a revision; None without a network.

    Raises:
        UserError: no such repository or revision.
    """
    import huggingface_hub

    try:
        with _clear_errors(repo, revision):
            info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
    except UserError:
        raise
    except Exception:  # see `_download`
        return None
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return Repository(
        {file.rfilename: file.size or 0 for file in info.siblings or []}, next(iter(tags), None)
    )


def fetch(
    repo: str, *, revision: str, files: Sequence[str], progress: DownloadProgress | None
) -> Path:
    """The folder in the cache with all of these files of a repository.

    Files that are there are not downloaded again, so that an interrupted call can be resumed.

    Raises:
        UserError: a file that is missing in the repository, no access, no network, no space.
    """
    return _download(repo, revision=revision, files=files, progress=progress, whole=True)


def _download(
    repo: str,
    *,
    revision: str | None,
    files: Sequence[str],
    progress: DownloadProgress | None,
    whole: bool = False,
) -> Path:
    """See `find_model`, and with `whole`, where `files` are names, `fetch`."""
    import huggingface_hub
    from huggingface_hub import errors

    # A name may have brackets.
    patterns = [glob.escape(name) for name in files] if whole else list(files)
    shown = {} if progress is None else {"tqdm_class": _reporting_bar(repo, progress)}

    def snapshot(**kwargs: Any) -> Path:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, **shown, **kwargs
            )
        )
        show_as(folder, repo)
        missing = [name for name in files if whole and not (folder / name).is_file()]
        if missing and not kwargs:
            raise UserError(f"the repository {repo} has no file {missing[0]}: it is incomplete")
        if missing:
            raise errors.LocalEntryNotFoundError(missing[0])
        return folder

    try:
        with _clear_errors(repo, revision):
            return snapshot()
    except UserError:
        raise
    except Exception as error:
        # The exceptions for a network failure differ between versions of the hub client.
        reason = _reason(error)
        try:
            return snapshot(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            at = f" at revision {revision}" if revision else ""
            if whole:
                raise UserError(
                    f"the download of {repo} stopped ({reason}): run the same command again to "
                    "resume"
                ) from None
            raise UserError(
                f"no folder {repo}, and as a Hugging Face repository{at} it is not in the cache "
                f"and cannot be fetched: {reason}; --model also takes a folder"
            ) from None


def _reason(error: BaseException) -> str:
    """Why a download failed, plainly if there is no connection."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) not in (None, *chain):
        chain.append(cause)
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set"
    no_connection = {"ConnectError", "ConnectTimeout", "ConnectionError", "gaierror"}
    if names & no_connection and "SSLError" not in names:
        return "no connection to Hugging Face"
    text = (str(error).strip().splitlines() or ["no answer"])[0]
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _clear_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub refuses into a `UserError`; without the client's own warnings."""
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
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
    finally:
        logging.set_verbosity(before)


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
