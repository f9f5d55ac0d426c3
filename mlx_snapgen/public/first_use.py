"""The first use of a public model: fetch its files, convert it into the cache.

The cache holds one folder of `mlx_snapgen.teachers.folder` for each model, commit and quantization.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.hub import DownloadProgress
from mlx_snapgen.errors import UserError, of_settings
from mlx_snapgen.files import check_writable, lock_folder, unlock_folder
from mlx_snapgen.inputs import read_inputs
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.description import PublicModel
from mlx_snapgen.public.estimate import (
    DEFAULT_BITS,
    check_fits,
    choose_bits,
    describe_work,
    kept_bytes,
    text_encoder_bytes,
    text_encoder_rows,
    written,
)
from mlx_snapgen.public.files import Folders, fetch_files, needed_files
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.public.source import part_source
from mlx_snapgen.public.teachers import (
    TEXT_KINDS,
    TeacherParts,
    check_text_encoder,
    convert_teacher,
)
from mlx_snapgen.reading import MOST_BYTES, read_object
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.folder import (
    TeacherFolder,
    cache_folder,
    load_teacher_config,
    quantizable,
)
from mlx_snapgen.teachers.memory import GROUP_SIZE
from mlx_snapgen.tensor_files import read_header

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Suffixes of files that a folder of a model may have, too."""

DTYPE: mx.Dtype | None = mx.bfloat16
"""Of the converted weights: some models are published in float32, and made for bfloat16."""

POLL = 0.5
"""Seconds between two tries to convert what another process converts."""

Say = Callable[[str], object]


def open_public(
    model: PublicModel,
    choice: ModelChoice,
    *,
    settings: DrawSettings | None = None,
    progress: DownloadProgress | None = None,
    converting: DownloadProgress | None = None,
    say: Say | None = None,
) -> TeacherFolder:
    """The model in the cache; the first time it is fetched and converted.

    An interrupted call resumes where it stopped. If another process converts the same model, the
    call waits until that has ended.

    Args:
        choice: `quantize` is the bits per weight of transformer blocks and text encoder; 0 does not
            quantize. None takes what is in the cache, and otherwise selects by the machine's
            memory.
        settings: resolved; a model that cannot draw with them here is not fetched.
        progress: of the download; None shows a bar.
        converting: progress of the conversion, with the name of the part; None shows bars. Also of
            one in another process, with the name of the model; None shows nothing of that.
        say: is called with a line about the model before it is fetched, and one before the call
            waits; None prints them on stderr.

    Raises:
        UserError: files that are missing or damaged, no access, no network, no space on the disk,
            or nothing to quantize.
    """
    bits = choice.quantize
    say = say or (lambda line: print(line, file=sys.stderr))
    for known in DEFAULT_BITS if bits is None else (bits,):
        if _target(model, known).is_dir():
            return _opened(model, known)
    files = needed_files(model)
    text = text_encoder_bytes(model, files)
    chosen = choose_bits(model, text) if bits is None else bits
    if chosen and not quantizable(model.network, GROUP_SIZE):
        raise UserError(_unquantizable(model.name, "transformer"))
    if chosen and all(length % GROUP_SIZE for length in text_encoder_rows(model)):
        raise UserError(_unquantizable(model.name, "text encoder"))
    if settings is not None:
        with of_settings():
            check_fits(model, choice, settings=settings, bits=chosen, text=text)
            read_inputs(settings, unit=model.config.size_unit)
    total = kept_bytes(model, files, bits=chosen, text=text)
    with _alone(model, _parts(model, chosen), say=say, progress=converting, total=total):
        if not _target(model, chosen).is_dir():
            parts = _parts(model, chosen)
            size = None
            if settings is not None and settings.height and settings.width:
                size = settings.height, settings.width
            say(describe_work(model, files, parts=parts, bits=chosen, text=text, size=size))
            _convert(model, fetch_files(model, files, progress), bits=chosen, progress=converting)
    return _opened(model, chosen)


def _unquantizable(name: str, part: str) -> str:
    return (
        f"the {part} of {name} cannot be quantized, because {GROUP_SIZE} divides the rows of none "
        "of its matrices: choose --quantize none"
    )


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


def _parts(model: PublicModel, bits: int) -> Path:
    """The folder of the finished parts, until the whole model is converted."""
    target = _target(model, bits)
    return target.with_name(f"{target.name}.parts")


@contextmanager
def _alone(
    model: PublicModel, parts: Path, *, say: Say, progress: DownloadProgress | None, total: int
) -> Iterator[None]:
    """Lock the folder of the parts; wait for another process that has the lock until it ends.

    Args:
        progress: is called with the bytes that the other process has written, of about `total`.
    """
    try:
        check_writable(parts)
    except UserError as error:
        raise UserError(f"{error}: set MLX_SNAPGEN_CACHE to another folder") from None
    is_waiting = False
    while True:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            if lock_folder(parts):
                break
        except FileNotFoundError:
            continue  # the other process has finished and deletes the folder
        except OSError as error:
            raise UserError(f"cannot write to {parts}: {error.strerror}") from None
        if not is_waiting:
            say(f"another process converts {model.name} into {parts.parent}: waiting for it")
            is_waiting = True
        if progress is not None:
            progress(model.name, min(written(parts), total), total)
        time.sleep(POLL)
    try:
        yield
        shutil.rmtree(parts, ignore_errors=True)
    finally:
        with suppress(OSError):
            parts.rmdir()  # nothing is in it if the model was refused
        unlock_folder(parts)


def _identity(path: Path, *, every: bool = False) -> str:
    """Hexadecimal digits that change with a file, or with the files of a folder.

    Args:
        every: count pictures and what is hidden, such as .git, too, which no model needs.
    """
    files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    names = {p: p.relative_to(path) for p in files}
    if not every:
        files = [
            p
            for p, name in names.items()
            if not any(part.startswith(".") for part in name.parts)
            and p.suffix.lower() not in PICTURES
        ]
    stats = [[str(names[p]), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    identity = json.dumps([str(path.resolve()), stats])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


# --- conversion -----------------------------------------------------------------------------------


def _convert(
    model: PublicModel, folders: Folders, *, bits: int, progress: DownloadProgress | None
) -> None:
    """Convert a model in diffusers' format part by part; finished parts are kept until the end."""
    how = {"bits": bits, "group_size": GROUP_SIZE} if bits else None
    parts = _parts(model, bits)
    # Before the first part, which takes minutes.
    plan = check_text_encoder(
        folders.text, folders.model / "tokenizer", network=model.network, work=parts
    )
    if how and not plan.matrices(GROUP_SIZE):
        raise UserError(_unquantizable(model.name, "text encoder"))
    del plan  # with the weights
    if model.kind != "minit2i":
        read_autoencoder(folders.model / "vae")
    sources = {
        "transformer": (model.kind, folders.model / "transformer", model.file),
        "text_encoder": (TEXT_KINDS[model.kind], folders.text, None),
    }
    for part, (kind, folder, file) in sources.items():
        if not _is_whole(parts / part):
            shutil.rmtree(parts / part, ignore_errors=True)
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
        _target(model, bits),
        TeacherParts(
            transformer=parts / "transformer", text_part=parts / "text_encoder", move=True
        ),
    )


def _is_whole(part: Path) -> bool:
    """Whether a part of an earlier call is there and not damaged."""
    try:
        for name in ("config.json", "report.json"):
            read_object(part / name, most=MOST_BYTES)
        return bool([read_header(path) for path in part.glob("*.safetensors")])
    except UserError:
        return False
