"""The first use of a public model: describe it, fetch its files, convert it into the cache.

The cache holds one folder of `mlx_snapgen.teachers.folder` for each model, commit and quantization.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.hub import (
    DownloadProgress,
    fetch,
    find_model,
    local_folder,
    quiet,
    read_repository,
)
from mlx_snapgen.checkpoint.t5 import TOKENIZER, t5_config
from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.files import check_writable, read_object
from mlx_snapgen.formats import INDEX, find_minit2i
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys.transformers import make_transformer
from mlx_snapgen.public.source import NAMES, part_source, shard_names
from mlx_snapgen.public.teachers import TEXT_KINDS, convert_teacher, read_schedules
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
"""`_class_name` in model_index.json of the models that can be drawn with, except MiniT2I."""

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

WEIGHTS = ("transformer", "vae", "text_encoder")
"""Folders of a model's weights."""

MINIT2I_CONFIGS = "transformer/config.json", "scheduler/scheduler_config.json"
TEXT_CONFIG = "config.json"
TEXT_ENCODER = "text_encoder"

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of files that a folder of a model may have, too."""

DEFAULT_BITS = (0, 8, 4)
"""Quantizations to choose from: the first that leaves half of the machine's memory free, or the
last."""

DTYPE: mx.Dtype | None = mx.bfloat16
"""Of the converted weights: some models are published in float32, and made for bfloat16."""

Say = Callable[[str], object]


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

    kind: str
    name: str
    network: TeacherNetwork
    """With lazy random weights."""
    file: Path | None = None
    """File with the transformer, instead of that in the folder or repository."""
    inside: str = ""
    """Folder of the model in the folder or repository, ending in /."""
    text: Place | None = None
    """Where the text encoder is, unless it is in the model's folder."""


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
            all known models except MiniT2I need.
    """
    if (inside := find_minit2i(folder)) is not None:
        return _describe_minit2i(Place(source, folder, commit), inside)
    if importlib.util.find_spec("mlx_lm") is None:
        raise UserError('public models need mlx-lm: pip install "mlx_snapgen[teacher]"')
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
    text = read_object(folder / "text_encoder" / "config.json").get("model_type")
    if text not in PROMPT_FORMATS[kind].model_types:
        raise UserError(f"{source} has a {text} as text encoder, which does not fit a {kind}")
    schedule, few_step = read_schedules(folder, network, has_few_step=False)
    return PublicModel(
        source,
        folder,
        commit,
        kind=kind,
        name=MODEL_NAMES[kind, schedule == few_step],
        network=network,
    )


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
    if not (where / TEXT_CONFIG).is_file():
        name = values.get("llm")
        if not isinstance(name, str) or not re.fullmatch(FLAN_T5, name):
            raise UserError(f"{path} names {name!r} as text encoder, which is no FLAN-T5")
        where = find_model(name, files=[TEXT_CONFIG], progress=quiet)
        text = Place(name, where, where.name if local_folder(name) is None else None)
    if t5_config(read_object(where / TEXT_CONFIG), where).hidden_size != network.config.text_dims:
        raise UserError(f"{where} does not fit {path}: its states have another width")
    read_schedules(folder, network, has_few_step=False)
    return PublicModel(
        place.source,
        place.folder,
        place.commit,
        kind=kind,
        name=MODEL_NAMES[kind, False],
        network=network,
        inside=inside,
        text=text,
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
    files = _files(model)
    text = _text_bytes(model, files)
    chosen = _choose_bits(model, text) if bits is None else bits
    _describe_work(model, files, bits=chosen, text=text, say=say)
    _convert(model, _fetch(model, files, progress), bits=chosen, progress=converting)
    return _opened(model, chosen)


def fetch_public(model: PublicModel, *, progress: DownloadProgress | None = None) -> Folders:
    """The folders with all files of a model that are needed; a repository's are fetched.

    Raises:
        UserError: a file that is missing, no access, no network, no space.
    """
    return _fetch(model, _files(model), progress)


def _fetch(model: PublicModel, files: Files, progress: DownloadProgress | None) -> Folders:
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
    suffix = f"-{bits}bit" if bits else "-whole"
    if model.file is not None:
        name = f"{model.file.stem}-{_identity(model.file)}-{name}"
    elif model.commit is None:
        # Earlier versions counted all files.
        before = _identity(model.folder, every=True)
        converted = cache_folder() / f"{model.folder.name}-{before}{suffix}"
        if converted.is_dir():
            return converted
    return cache_folder() / (name + suffix)


def _identity(path: Path, *, every: bool = False) -> str:
    """Hexadecimal digits that change with a file, or with the files of a folder.

    Args:
        every: count hidden files and pictures, too, which no model needs.
    """
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    if not every:
        files = [p for p in files if not (p.name.startswith(".") or p.suffix.lower() in PICTURES)]
    stats = [[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    identity = json.dumps([str(path.resolve()), stats])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


# --- files ----------------------------------------------------------------------------------------


def _files(model: PublicModel) -> Files:
    """The files to read, with their bytes: not other variants of the same weights.

    Raises:
        UserError: a file that is missing.
    """
    own, license_ = _needed(model, lambda sizes: _needed_files(model, sizes))
    if model.text is None:
        return Files(own, {}, (license_,))
    place = model.text
    text, other = _needed(place, lambda sizes: _needed_text(place, sizes))
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
            raise
        raise UserError(
            f"{place.source} is not in the cache, and Hugging Face cannot be reached: try "
            "again with a network"
        ) from None


def _needed_files(model: PublicModel, sizes: Mapping[str, int]) -> dict[str, int]:
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
        wanted += _needed_text(model, sizes, f"{model.inside}{TEXT_ENCODER}/")
    tokenizer = [name for name in sizes if name.startswith("tokenizer/") and name.count("/") == 1]
    if not draws_pixels and not tokenizer:
        raise UserError(f"{model.source} is incomplete: it has no folder tokenizer")
    return _found(model, [*wanted, *([] if draws_pixels else tokenizer)], sizes)


def _needed_text(place: Place, sizes: Mapping[str, int], inside: str = "") -> dict[str, int]:
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


# --- what it takes ----------------------------------------------------------------------------


def _text_bytes(model: PublicModel, files: Files) -> int:
    """Bytes of the text encoder in 16 bits."""
    if model.kind != "minit2i":
        return sum(size for name, size in files.own.items() if name.startswith("text_encoder/"))
    place = model.text
    folder = model.folder / model.inside / TEXT_ENCODER if place is None else place.folder
    path = folder / TEXT_CONFIG
    # Its files also have a decoder.
    network = T5Encoder(t5_config(read_object(path), path))
    return 2 * sum(value.size for value in flat_parameters(network).values())


def _side(model: PublicModel) -> int:
    """Default side of a picture in pixels."""
    return getattr(model.network.config, "image_size", 1024)


def _memory(model: PublicModel, bits: int, text: int) -> int:
    """Peak memory of drawing the default size, with a text encoder of `text` bytes in 16 bits."""
    sizes = measure(model.network, bits=bits, text=text_bytes(text, bits))
    return sizes.peak(_side(model), _side(model))


def _choose_bits(model: PublicModel, text: int) -> int:
    most = machine_memory() // 2
    for bits in DEFAULT_BITS:
        if _memory(model, bits, text) <= most:
            return bits
    return DEFAULT_BITS[-1]


def _describe_work(model: PublicModel, files: Files, *, bits: int, text: int, say: Say) -> None:
    """Say what the first use does; `UserError` if the disk has no room for it."""
    target, count = _target(model, bits), sum(p.size for p in _arrays(model))
    places = [(model.folder, files.own), (model.text and model.text.folder, files.text)]
    fetched = sum(
        size
        for folder, some in places
        for name, size in some.items()
        if folder is None or not (folder / name).is_file()
    )
    # In 16 bits, whatever the type of the transformer's file.
    weights = 2 * count + (text if model.kind == "minit2i" else 0)
    if model.kind != "minit2i":
        weights += sum(
            size
            for name, size in files.own.items()
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
    license_, *others = files.licenses
    what = f"{model.name} ({count / 1e9:.1f} billion weights"
    what += f", license {license_})" if license_ else ")"
    if model.text is not None:
        what += f" with {model.text.source}"
        what += f" (license {others[0]})" if others[0] else ""
    number = plural(len(files.own) + len(files.text), "file")
    work = f"fetching {_gb(fetched)} in {number} and " if fetched else ""
    how = f"in {bits} bits" if bits else "without quantization"
    say(
        f"{what}: {work}converting it once, {how}, to {_gb(kept)} in {target.parent}; drawing "
        f"{_side(model)} x {_side(model)} takes about {_gb(memory)} of memory"
    )


def _arrays(model: PublicModel) -> list[Any]:
    return list(flat_parameters(model.network).values())


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


# --- conversion -----------------------------------------------------------------------------------


def _convert(
    model: PublicModel, folders: Folders, *, bits: int, progress: DownloadProgress | None
) -> None:
    """Convert a model in diffusers' format part by part; finished parts are kept until the end."""
    how = {"bits": bits, "group_size": GROUP_SIZE} if bits else None
    target = _target(model, bits)
    parts = target.with_name(f"{target.name}.parts")
    sources = {
        "transformer": (model.kind, folders.model / "transformer", model.file),
        "text_encoder": (TEXT_KINDS[model.kind], folders.text, None),
    }
    for part, (kind, folder, file) in sources.items():
        if not (parts / part).is_dir():
            convert(
                part_source(folder, file),
                parts / part,
                kind=kind,
                dtype=DTYPE,
                quantization=how,
                progress=progress,
            )
    convert_teacher(
        folders.model,
        target,
        transformer=parts / "transformer",
        text_part=parts / "text_encoder",
        move=True,
    )
    shutil.rmtree(parts, ignore_errors=True)
