"""The files of a public model that are needed, and their download."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mlx_snapgen.checkpoint.hub import DownloadProgress, fetch, quiet, read_repository
from mlx_snapgen.checkpoint.t5 import TOKENIZER
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_link
from mlx_snapgen.public.description import (
    CONFIGS,
    MINIT2I_CONFIGS,
    TEXT_CONFIG,
    TEXT_ENCODER,
    Place,
    PublicModel,
)
from mlx_snapgen.public.source import NAMES, shard_names
from mlx_snapgen.tensor_files import read_header

WEIGHTS = ("transformer", "vae", "text_encoder")
"""Folders of a model's weights."""


class Files(NamedTuple):
    """The files of a model that are needed, with their bytes."""

    own: dict[str, int]
    text: dict[str, int]
    """Those in the place of the text encoder."""
    licenses: tuple[str | None, ...]
    """Of the model, and of a text encoder in another place; None: not known."""


class Folders(NamedTuple):
    """Folders with the files of a model."""

    model: Path
    text: Path
    """Of the text encoder."""


def fetch_public(model: PublicModel) -> Folders:
    """The folders with all files of a model that are needed; a repository's are fetched.

    Raises:
        UserError: a file that is missing, no access, no network, no space.
    """
    return fetch_files(model, needed_files(model), None)


def fetch_files(model: PublicModel, files: Files, progress: DownloadProgress | None) -> Folders:
    """All files, with one bar or `progress`."""
    total = sum(files.own.values()) + sum(files.text.values())
    folder, text = model.folder, model.text
    with _bar(model.source, total, progress) as shown:
        if model.commit is not None:
            folder = fetch(
                model.source, revision=model.commit, files=list(files.own), progress=shown
            )
        where = folder / model.inside / TEXT_ENCODER
        if text is not None:
            where = text.folder
        if text is not None and text.commit is not None:
            before = sum(files.own.values())

            def later(name: str, done: int, _: int) -> None:
                shown(name, before + done, total)

            where = fetch(text.source, revision=text.commit, files=list(files.text), progress=later)
    return Folders(folder / model.inside, where)


def needed_files(model: PublicModel) -> Files:
    """The files to read, with their bytes: not other variants of the same weights.

    Raises:
        UserError: a file that is missing.
    """
    own, license_ = _needed(model, lambda sizes: _own_files(model, sizes))
    if model.text is None:
        return Files(own, {}, (license_,))
    place = model.text
    text, other = _needed(place, lambda sizes: _text_files(place, sizes))
    return Files(own, text, (license_, other))


def _needed(
    place: Place, choose: Callable[[Mapping[str, int]], dict[str, int]]
) -> tuple[dict[str, int], str | None]:
    """What `choose` takes of the files in a place, and their license if that is known."""
    if place.commit is not None:
        found = read_repository(place.source, place.commit)
        if found is not None:
            return choose(found.files), found.license
    folder = place.folder
    paths = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    try:
        return choose(sizes), None
    except UserError:
        if place.commit is None:
            for path in sorted(folder.rglob("*.safetensors")):
                check_link(path)
                if not path.is_file():
                    read_header(path)  # the error is what it is
            raise
        raise UserError(
            f"{place.source} is not in the cache, and Hugging Face cannot be reached: try "
            "again with a network"
        ) from None


def _own_files(model: PublicModel, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those in the place of the model."""
    draws_pixels = model.kind == "minit2i"
    wanted = [model.inside + name for name in (MINIT2I_CONFIGS if draws_pixels else CONFIGS)]
    if draws_pixels and wanted[-1] not in sizes:
        wanted.pop()  # The schedule has defaults.
    parts = ("transformer",) if draws_pixels else WEIGHTS
    for part in parts:
        if part != "transformer" or model.file is None:
            wanted += _weight_files(model, model.inside + part, sizes)
    if draws_pixels and model.text is None:
        wanted += _text_files(model, sizes, f"{model.inside}{TEXT_ENCODER}/")
    tokenizer = [name for name in sizes if name.startswith("tokenizer/") and name.count("/") == 1]
    if not draws_pixels and not tokenizer:
        raise UserError(f"{model.source} is incomplete: it has no folder tokenizer")
    return _found(model, [*wanted, *([] if draws_pixels else tokenizer)], sizes)


def _text_files(place: Place, sizes: Mapping[str, int], inside: str = "") -> dict[str, int]:
    """Those of a T5."""
    wanted = [f"{inside}{name}" for name in (TEXT_CONFIG, TOKENIZER)]
    return _found(place, [*wanted, *_weight_files(place, inside.rstrip("/"), sizes)], sizes)


def _found(place: Place, wanted: Iterable[str], sizes: Mapping[str, int]) -> dict[str, int]:
    if missing := [name for name in wanted if name not in sizes]:
        raise UserError(f"{place.source} is incomplete: it has no {missing[0]}")
    return {name: sizes[name] for name in wanted}


def _weight_files(place: Place, part: str, sizes: Mapping[str, int]) -> list[str]:
    """The weights in a folder, with their index if there is one."""
    inside = f"{part}/" if part else ""
    for stem in NAMES:
        index = f"{inside}{stem}.safetensors.index.json"
        if index in sizes:
            folder = place.folder
            if place.commit is not None:
                folder = fetch(place.source, revision=place.commit, files=[index], progress=quiet)
            return [index, *(f"{inside}{name}" for name in shard_names(folder / index))]
        if (name := f"{inside}{stem}.safetensors") in sizes:
            return [name]
    raise UserError(f"{place.source} is incomplete: {part or 'it'} has no weights as .safetensors")


@contextmanager
def _bar(source: str, total: int, progress: DownloadProgress | None) -> Iterator[DownloadProgress]:
    """`progress`, or one bar for all files."""
    if progress is not None:
        given = progress
        yield lambda name, done, _: given(name, min(done, total), total)
        return
    with tqdm(
        desc=source, total=total, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:

        def show(_: str, done: int, __: int) -> None:
            bar.update(max(0, min(done, total) - bar.n))

        yield show
