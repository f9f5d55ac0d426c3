"""The first use of a public model: describe it, fetch its files, convert it into the cache.

The cache holds one folder of `mlx_snapgen.teachers.folder` for each model, commit and quantization.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.hub import (
    DownloadProgress,
    fetch,
    find_model,
    quiet,
    read_repository,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_writable, read_object
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys.transformers import make_transformer
from mlx_snapgen.public.source import NAMES, part_source, shard_names
from mlx_snapgen.public.teachers import convert_teacher, read_schedules
from mlx_snapgen.settings import machine_memory
from mlx_snapgen.teachers.config import NAMES as MODEL_NAMES
from mlx_snapgen.teachers.folder import (
    PROMPT_FORMATS,
    TeacherFolder,
    TeacherNetwork,
    load_teacher_config,
)
from mlx_snapgen.teachers.memory import GROUP_SIZE, measure, text_bytes

PIPELINES = ("ZImagePipeline", "QwenImagePipeline", "Flux2KleinPipeline")
"""`_class_name` in model_index.json of the models that can be drawn with."""

INDEX = "model_index.json"
CONFIGS = (
    INDEX,
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
)
"""Files that describe a model."""

WEIGHTS = ("transformer", "vae", "text_encoder")
"""Folders of a model's weights."""

DEFAULT_BITS = (0, 8, 4)
"""Quantizations to choose from: the first that leaves half of the machine's memory free, or the
last."""

DTYPE: mx.Dtype | None = mx.bfloat16
"""Of the converted weights: some models are published in float32, and made for bfloat16."""

Say = Callable[[str], object]


@dataclass(frozen=True)
class PublicModel:
    """A model in diffusers' format, described by its configs alone."""

    source: str
    """The folder or repository that the user named."""
    folder: Path
    """Where its configs are; of a local model also its weights."""
    commit: str | None
    """Of a repository; None for a local folder."""
    kind: str
    name: str
    network: TeacherNetwork
    """With lazy random weights."""
    file: Path | None = None
    """File with the transformer, instead of that in the folder or repository."""


def is_public(folder: Path) -> bool:
    """Whether a folder is a model in diffusers' format."""
    return (folder / INDEX).is_file()


def cache_folder() -> Path:
    """Folder of converted models: $MLX_SNAPGEN_CACHE, or mlx_snapgen in the user's cache."""
    given = os.environ.get("MLX_SNAPGEN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_snapgen"


def describe(source: str, folder: Path, commit: str | None) -> PublicModel:
    """A model, from its configs in `folder`.

    Raises:
        UserError: a model that cannot be drawn with, a config that is missing, or no mlx-lm, which
            all known models need.
    """
    if importlib.util.find_spec("mlx_lm") is None:
        raise UserError('public models need mlx-lm: pip install "mlx_snapgen[teacher]"')
    name = read_object(folder / INDEX).get("_class_name")
    if name not in PIPELINES:
        raise UserError(
            f"{source} is a {name}, which cannot be drawn with: known are {', '.join(PIPELINES)}"
        )
    if commit is not None:
        folder = find_model(source, revision=commit, files=CONFIGS, progress=quiet)
    path = folder / "transformer" / "config.json"
    kind, network = make_transformer(read_object(path), path)
    text = read_object(folder / "text_encoder" / "config.json").get("model_type")
    if text not in PROMPT_FORMATS[kind].model_types:
        raise UserError(f"{source} has a {text} as text encoder, which does not fit a {kind}")
    schedule, few_step = read_schedules(folder, kind, has_few_step=False)
    return PublicModel(
        source,
        folder,
        commit,
        kind=kind,
        name=MODEL_NAMES[kind, schedule == few_step],
        network=network,
    )


def open_public(
    model: PublicModel,
    *,
    bits: int | None = None,
    progress: DownloadProgress | None = None,
    converting: DownloadProgress | None = None,
    say: Say | None = None,
) -> TeacherFolder:
    """The model in the cache; the first time it is fetched and converted.

    An interrupted call resumes where it stopped.

    Args:
        bits: per weight of transformer blocks and text encoder; 0 does not quantize. None takes
            what is in the cache, and otherwise selects by the machine's memory.
        progress: of the download; None shows a bar.
        converting: progress of the conversion, with the name of the part; None shows bars.
        say: is called with a line about the model before it is fetched; None prints it on stderr.

    Raises:
        UserError: files that are missing or damaged, no access, no network, no space on the disk.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    for known in DEFAULT_BITS if bits is None else (bits,):
        if _target(model, known).is_dir():
            return _opened(model, known)
    sizes, license_ = _sizes(model)
    files = _needed_files(model, sizes)
    text = sum(size for name, size in files.items() if name.startswith("text_encoder/"))
    chosen = _choose_bits(model, text) if bits is None else bits
    _describe_work(model, files, bits=chosen, license_=license_, text=text, say=say)
    folder = _fetch(model, files, progress)
    _convert(model, folder, bits=chosen, progress=converting)
    return _opened(model, chosen)


def fetch_public(model: PublicModel, *, progress: DownloadProgress | None = None) -> Path:
    """The folder with all files of a model that are needed, which a repository's are fetched to.

    Raises:
        UserError: a file that is missing, no access, no network, no space.
    """
    sizes, _ = _sizes(model)
    return _fetch(model, _needed_files(model, sizes), progress)


def _fetch(model: PublicModel, files: Mapping[str, int], progress: DownloadProgress | None) -> Path:
    if model.commit is None:
        return model.folder
    with _bar(model, files, progress) as shown:
        return fetch(model.source, revision=model.commit, files=list(files), progress=shown)


def _opened(model: PublicModel, bits: int) -> TeacherFolder:
    target = _target(model, bits)
    return TeacherFolder(
        target,
        load_teacher_config(target),
        source=model.source if model.file is None else str(model.file),
        revision=model.commit,
        quantize=bits,
    )


def _target(model: PublicModel, bits: int) -> Path:
    """The folder of the converted model."""
    if model.commit is not None:
        name = f"{model.source.replace('/', '--')}-{model.commit[:12]}"
    else:
        name = f"{model.folder.name}-{_identity(model.folder)}"
    if model.file is not None:
        name = f"{model.file.stem}-{_identity(model.file)}-{name}"
    return cache_folder() / f"{name}-{f'{bits}bit' if bits else 'whole'}"


def _identity(path: Path) -> str:
    """Hexadecimal digits that change with a file, or with the files of a folder."""
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    stats = [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    identity = json.dumps([str(path.resolve()), stats])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


# --- files ----------------------------------------------------------------------------------------


def _sizes(model: PublicModel) -> tuple[Mapping[str, int], str | None]:
    """Files of the whole model with their bytes, and its license if that is known."""
    if model.commit is not None:
        found = read_repository(model.source, model.commit)
        if found is not None:
            return found.files, found.license
    folder = model.folder
    paths = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    if model.commit is not None:
        try:
            _needed_files(model, sizes)
        except UserError:
            raise UserError(
                f"{model.source} is not in the cache, and Hugging Face cannot be reached: try "
                "again with a network"
            ) from None
    return sizes, None


def _needed_files(model: PublicModel, sizes: Mapping[str, int]) -> dict[str, int]:
    """The files to read, with their bytes: not other variants of the same weights.

    Raises:
        UserError: a file that is missing.
    """
    wanted = [*CONFIGS]
    for part in WEIGHTS:
        if part != "transformer" or model.file is None:
            wanted += _weight_files(model, part, sizes)
    tokenizer = [name for name in sizes if name.startswith("tokenizer/") and name.count("/") == 1]
    if not tokenizer:
        raise UserError(f"{model.source} is incomplete: it has no folder tokenizer")
    wanted += tokenizer
    if missing := [name for name in wanted if name not in sizes]:
        raise UserError(f"{model.source} is incomplete: it has no {missing[0]}")
    return {name: sizes[name] for name in wanted}


def _weight_files(model: PublicModel, part: str, sizes: Mapping[str, int]) -> list[str]:
    """The weights of a part, with their index if there is one."""
    for stem in NAMES:
        index = f"{part}/{stem}.safetensors.index.json"
        if index in sizes:
            folder = model.folder
            if model.commit is not None:
                folder = fetch(model.source, revision=model.commit, files=[index], progress=quiet)
            return [index, *(f"{part}/{name}" for name in shard_names(folder / index))]
        if (name := f"{part}/{stem}.safetensors") in sizes:
            return [name]
    raise UserError(f"{model.source} is incomplete: {part} has no weights as .safetensors")


@contextmanager
def _bar(
    model: PublicModel, files: Mapping[str, int], progress: DownloadProgress | None
) -> Iterator[DownloadProgress]:
    """`progress`, or one bar for all files."""
    total = sum(files.values())
    if progress is not None:
        given = progress
        yield lambda name, done, _: given(name, min(done, total), total)
        return
    with tqdm(
        desc=model.source, total=total, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:

        def show(_: str, done: int, __: int) -> None:
            bar.update(max(0, min(done, total) - bar.n))

        yield show


# --- what it takes ----------------------------------------------------------------------------


def _memory(model: PublicModel, bits: int, text: int) -> int:
    """Peak memory of drawing 1024 x 1024, with a text encoder of `text` bytes in 16 bits."""
    # All known autoencoders make a latent of 8 x 8 pixels.
    unit = 8 * model.network.config.patch_size
    sizes = measure(model.network, bits=bits, text=text_bytes(text, bits), unit=unit)
    return sizes.peak(1024, 1024)


def _choose_bits(model: PublicModel, text: int) -> int:
    most = machine_memory() // 2
    for bits in DEFAULT_BITS:
        if _memory(model, bits, text) <= most:
            return bits
    return DEFAULT_BITS[-1]


def _describe_work(
    model: PublicModel,
    files: Mapping[str, int],
    *,
    bits: int,
    license_: str | None,
    text: int,
    say: Say,
) -> None:
    """Say what the first use does; `UserError` if the disk has no room for it."""
    target, count = _target(model, bits), sum(p.size for p in _arrays(model))
    fetched = sum(size for name, size in files.items() if not (model.folder / name).is_file())
    # In 16 bits, whatever the type of the transformer's file.
    weights = 2 * count + sum(
        size
        for name, size in files.items()
        if name.endswith(".safetensors") and not name.startswith("transformer/")
    )
    share = (bits + 32 / GROUP_SIZE) / 16 if bits else 1
    kept = int(weights * share)
    memory = _memory(model, bits, text)
    check_writable(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = fetched + kept, shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(
            f"{model.name} needs {_gb(needed)} of disk, and {target.parent} has {_gb(free)}: free "
            "some" + (", or choose --quantize 4" if bits != 4 else "")
        )
    what = f"{model.name} ({count / 1e9:.1f} billion weights"
    what += f", license {license_})" if license_ else ")"
    work = f"fetching {_gb(fetched)} in {len(files)} files and " if fetched else ""
    how = f"in {bits} bits" if bits else "without quantization"
    say(
        f"{what}: {work}converting it once, {how}, to {_gb(kept)} in {target.parent}; drawing "
        f"1024 x 1024 takes about {_gb(memory)} of memory"
    )


def _arrays(model: PublicModel) -> list[Any]:
    return list(flat_parameters(model.network).values())


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


# --- conversion -----------------------------------------------------------------------------------


def _convert(
    model: PublicModel, folder: Path, *, bits: int, progress: DownloadProgress | None
) -> None:
    """Convert a model in diffusers' format part by part; finished parts are kept until the end.

    Args:
        folder: with the files of the model's folder or repository.
    """
    how = {"bits": bits, "group_size": GROUP_SIZE} if bits else None
    target = _target(model, bits)
    parts = target.with_name(f"{target.name}.parts")
    for part, kind in (("transformer", model.kind), ("text_encoder", "qwen")):
        if not (parts / part).is_dir():
            source = part_source(folder / part, model.file if part == "transformer" else None)
            convert(
                source,
                parts / part,
                kind=kind,
                dtype=DTYPE,
                quantization=how,
                progress=progress,
            )
    convert_teacher(
        folder,
        target,
        transformer=parts / "transformer",
        text_part=parts / "text_encoder",
        move=True,
    )
    shutil.rmtree(parts, ignore_errors=True)
