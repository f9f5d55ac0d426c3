"""Public checkpoints: find their files, check that they are complete, and read weights lazily.

safetensors are read tensor by tensor when they are needed. A PyTorch pickle is first copied to
safetensors, by a function of the caller, because that needs torch.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.hub import find_model, quiet, read_repository
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_link, expanded
from mlx_snapgen.formats import INDEX
from mlx_snapgen.public.layouts import in_diffusers_names, scaled
from mlx_snapgen.reading import MOST_BYTES, read_json, read_object
from mlx_snapgen.tensor_files import load_tensors

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SIDE_FILES = ("*.json", "*.txt", "*.txt.gz", "*.model", "*.jinja")

NAMES = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model")
"""Names of weight files in the original libraries; they are preferred to other names."""

Spool = Callable[[Path, Path], Path]
"""Copies the tensors of a PyTorch pickle to a safetensors file, and returns the latter."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk."""

    path: Path
    """The folder or file that the user named."""
    folder: Path
    """The folder of its config and tokenizer."""
    files: tuple[Path, ...]
    config: dict[str, Any] | None
    """config.json; None if there is none, as for a single file."""
    spool: Spool | None = None
    """None refuses pickles."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def weights(self, spool: Path, *, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """All tensors by key, lazy. Pickles are first copied to safetensors in the folder `spool`.

        Weights in FP8 are multiplied by their scales, and the transformer in a single file gets
        diffusers' names (see `public.layouts`).

        Args:
            dtype: of weights that are stored in FP8; None: bfloat16.

        Raises:
            UserError: a file that is damaged, or more than weights; a key in two files.
        """
        found: dict[str, mx.array] = {}
        for i, path in enumerate(self.files):
            if path.suffix in PICKLES:
                if self.spool is None:
                    raise UserError(
                        f"{path} is not a .safetensors file: convert it with convert.from_torch"
                    )
                path = self.spool(path, spool / f"{i}.safetensors")
            tensors = load_tensors(path)
            if twice := next((key for key in tensors if key in found), None):
                raise UserError(f"{path} has '{twice}', which is also in an earlier file")
            found |= tensors
        found = scaled(found, dtype=dtype or mx.bfloat16, where=self.path)
        return in_diffusers_names(found)


def find_source(
    source: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    spool: Spool | None = None,
    check: Callable[[Source], object] = lambda described: None,
) -> Source:
    """The checkpoint in a folder, a file, or a Hugging Face repository.

    Args:
        spool: see `Source.spool`.
        check: is called with a repository, whose config may be None, before its weights are
            downloaded.

    Raises:
        UserError: no such source, a repository that cannot be downloaded, missing files, or several
            checkpoints.
    """
    path = expanded(source)
    check_link(path)
    if path.is_file():
        if revision or subfolder:
            raise UserError(f"{path} is a file: it has neither revisions nor subfolders")
        if path.suffix not in (".safetensors", *PICKLES):
            known = ", ".join((".safetensors", *PICKLES))
            raise UserError(f"{path} is no checkpoint: give a file ending in one of {known}")
        return Source(path, path.parent, (path,), None, spool)
    inside = f"{subfolder}/" if subfolder else ""
    is_local = path.is_dir()
    side_files = [inside + p for p in SIDE_FILES]
    if not is_local:
        described = find_model(source, revision=revision, files=side_files, progress=quiet)
        revision, here = described.name, described / inside
        if (here / INDEX).is_file() and (parts := _parts(here)):
            repository = read_repository(source, revision)
            raise _whole_pipeline(source, parts, repository.files if repository else ())
        check(Source(Path(source), here, (), _config(here), spool))
    folder = find_model(source, revision=revision, files=[*side_files, f"{inside}*.safetensors"])
    if not is_local and not [*(folder / inside).glob("*.safetensors")]:
        # Only now: many repositories have the same weights in pickles too.
        pickles = [f"{inside}*{suffix}" for suffix in PICKLES]
        folder = find_model(source, revision=revision, files=[*side_files, *pickles])
    folder = folder / inside
    if not folder.is_dir():
        raise UserError(f"{source} has no subfolder {subfolder}")
    for inside_it in sorted(folder.iterdir()):
        check_link(inside_it)
    files = _weight_files(folder)
    return Source(path if is_local else folder, folder, files, _config(folder), spool)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    return read_object(path) if path.is_file() else None


def _parts(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/config.json"))


def _whole_pipeline(source: object, parts: list[str], names: Iterable[str] = ()) -> UserError:
    """The error for one with `parts`; of its files' `names`, a single checkpoint is named."""
    others = f" (or {', '.join(parts[1:])})" if parts[1:] else ""
    whole = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    alone = f", or download {whole[0]} and give that file" if len(whole) == 1 else ""
    return UserError(
        f"{source} is a whole pipeline: name a part with --subfolder {parts[0]}{others}{alone}"
    )


def check_no_pipeline(source: Source) -> None:
    """`UserError` for a folder whose single file was taken, but which has parts, too."""
    if source.config is None and source.path.is_dir() and (parts := _parts(source.folder)):
        raise _whole_pipeline(source.path, parts)


def part_source(folder: Path, file: Path | None = None) -> Source:
    """The checkpoint of a part of a model in diffusers' format.

    Args:
        file: has the weights instead of the folder, which then has the config alone.
    """
    if file is None:
        return find_source(str(folder))
    return Source(file, folder, (file,), read_object(folder / "config.json"))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files of one checkpoint, by its index or its name."""
    for suffix in ("safetensors", *(s[1:] for s in PICKLES)):
        for stem in NAMES:
            if (path := folder / f"{stem}.{suffix}.index.json").is_file():
                return _indexed(path)
            if (path := folder / f"{stem}.{suffix}").is_file():
                return (path,)
        others = sorted(folder.glob(f"*.{suffix}"))
        if shards := [p for p in others if re.search(r"-\d+-of-\d+\.", p.name)]:
            raise UserError(
                f"{folder} lacks the index of its shards, "
                f"{shards[0].name.split('-0')[0]}.{suffix}.index.json: get it again"
            )
        if len(others) > 1:
            raise UserError(
                f"{folder} has several checkpoints, name one: {', '.join(p.name for p in others)}"
            )
        if others:
            return (others[0],)
    parts = sorted({p.parent.name for p in folder.glob("*/*") if p.suffix == ".safetensors"})
    if parts:
        raise _whole_pipeline(folder, parts)
    raise UserError(f"{folder} holds no weights: neither .safetensors nor {', '.join(PICKLES)}")


def shard_names(path: Path) -> list[str]:
    """The files that an index names, in its folder; `UserError` for one that is damaged."""
    index = read_json(path, most=MOST_BYTES)
    try:
        # Only file names: an index must not lead out of its folder.
        names = sorted({Path(name).name for name in index["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no index of shards: it has no weight_map") from None
    if wrong := next((name for name in names if not 0 < len(name.encode()) <= 255), None):
        raise UserError(f"{path} names a file that no disk can have: {wrong}")
    return names


def _indexed(path: Path) -> tuple[Path, ...]:
    """The shards that an index names."""
    files = tuple(path.parent / name for name in shard_names(path))
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"{path.parent} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if missing[1:] else "")
            + f", which {path.name} names: get it again"
        )
    return files


def config_of(source: Source) -> dict[str, Any]:
    """config.json of a checkpoint; `UserError` when it has none."""
    if source.config is None:
        check_no_pipeline(source)
        raise UserError(f"{source.path} needs the config.json of its folder: give the folder")
    return source.config
