"""Convert a public checkpoint to the format here, tensor by tensor."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.hub import DownloadProgress
from mlx_snapgen.cli.notices import peak_process_bytes
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_new, expanded, lock_folder, unlock_folder
from mlx_snapgen.public.keymap import check_complete
from mlx_snapgen.public.kinds import KINDS, Plan, find_kind
from mlx_snapgen.public.source import Source
from mlx_snapgen.public.stream import Entry, lazy, write_tensors

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


PIECE = 2**20
"""Numbers of a matrix that are quantized at a time. Larger pieces need more memory and, on the CPU,
more time for fresh pages."""


def convert(
    source: Source,
    out: str | Path,
    *,
    kind: str | None = None,
    dtype: mx.Dtype | None = None,
    quantization: Mapping[str, int] | None = None,
    revision: str | None = None,
    progress: DownloadProgress | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `source` as `out`, whole or not at all.

    Args:
        out: folder, or .safetensors file of a LoRA; must not exist, or be an empty folder.
        kind: one of `KINDS`; None detects it.
        dtype: floating type to store; None keeps each tensor's.
        quantization: {"bits", "group_size"} of the matrices whose rows the group size divides; None
            does not quantize.
        progress: is called with (kind, bytes done, bytes in total).

    Returns:
        The contents of report.json.

    Raises:
        UserError: files that are damaged or of an unknown network; an output that exists.
    """
    out = expanded(out)
    check_new(out)
    work = out.parent / f".{out.name}.partial"
    with _claimed(work):
        kind, plan, accounts = read_plan(source, kind, spool=work / "spool", dtype=dtype)
        _check_output(plan, out, is_quantized=quantization is not None)
        how = None if quantization is None else dict(quantization)
        entries = _entries(plan, dtype, how)
        wanted = [_identity(source), kind, str(dtype), how]
        _resume(work, hashlib.sha256(json.dumps(wanted).encode()).hexdigest())
        made = work / "out"
        made.mkdir(exist_ok=True)
        metadata = plan.metadata
        config = None if plan.config is None else plan.config(how)
        files, name = dict(plan.files), plan.file
        del plan
        total = sum(t.size * math.prod(shape) for e in entries for t, shape in e.shapes.values())
        with tqdm(
            desc=kind, total=total, unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            done = 0

            def show(count: int) -> None:
                nonlocal done
                done += count
                bar.update(count)
                if progress is not None:
                    progress(kind, min(done, total), total)

            notes = write_tensors(
                made / name, entries, work / "journal", metadata=metadata, progress=show
            )
        report = {
            "source": str(source.path),
            "revision": revision,
            "kind": kind,
            "dtype": None if dtype is None else str(dtype).removeprefix("mlx.core."),
            "quantization": how,
            "source_bytes": source.num_bytes,
            "bytes": (made / name).stat().st_size,
            "peak_process_bytes": peak_process_bytes(),
            "keys": accounts,
            "relative_errors": dict(note for note in notes if note),
        }
        if config is not None:
            files["config.json"] = json.dumps(config, indent=1).encode()
            files["report.json"] = json.dumps(report, indent=1).encode()
        for name_, data in files.items():
            (made / name_).write_bytes(data)
        _put(made / name if config is None else made, out)
    return report


def read_plan(
    source: Source, kind: str | None, *, spool: Path, dtype: mx.Dtype | None = None
) -> tuple[str, Plan, dict[str, Any]]:
    """Kind and plan of a checkpoint, lazily, and the report on its keys.

    Arguments and errors are those of `convert` and of `Source.weights`.
    """
    weights = source.weights(spool, dtype=dtype)
    kind = find_kind(source, weights, kind)
    accounts = _account(source, weights, kind)
    plan = KINDS[kind].plan(source, weights)
    if plan.expected is not None:
        keys = KINDS[kind].keys
        check_complete(keys, weights, plan.weights, plan.expected, where=source.path)
    return kind, plan, accounts


def _check_output(plan: Plan, out: Path, *, is_quantized: bool) -> None:
    if plan.config is None and out.suffix != ".safetensors":
        raise UserError(f"{out}: a LoRA is one file, give a name ending in .safetensors")
    if plan.config is None and is_quantized:
        raise UserError("a LoRA is not quantized: leave --quantize out")
    if plan.config is not None and out.suffix == ".safetensors":
        raise UserError(f"{out}: the output is a folder, with config.json beside the weights")


@contextlib.contextmanager
def _claimed(work: Path) -> Iterator[None]:
    """Lock the work folder; it is kept for the next try unless the conversion is complete."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        locked = lock_folder(work)
    except OSError as error:
        raise UserError(f"cannot write to {work.parent}: {error.strerror}") from None
    if not locked:
        raise UserError(f"another conversion is writing {work}: wait for it")
    try:
        yield
        shutil.rmtree(work, ignore_errors=True)
    except UserError:
        # A checkpoint that is refused cannot be resumed.
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        raise UserError(
            f"cannot write {work}: {error.strerror or error}; run the command again to resume"
        ) from None
    finally:
        unlock_folder(work)


def _identity(source: Source) -> list[Any]:
    """Values that change with a checkpoint's files."""
    stats = [(path, path.stat()) for path in source.files]
    return [[str(path.resolve()), s.st_size, s.st_mtime_ns] for path, s in stats]


def _resume(work: Path, wanted: str) -> None:
    """Keep the output of an earlier try of the same conversion; delete any other."""
    path = work / "wanted"
    if path.is_file() and path.read_text() == wanted:
        return
    (work / "journal").unlink(missing_ok=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    path.write_text(wanted)


def _put(made: Path, out: Path) -> None:
    if made.is_file():
        # Create the file, which fails if it exists, then replace it.
        try:
            os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise UserError(f"{out} exists already: choose another name") from None
    os.replace(made, out)


def _account(source: Source, weights: Mapping[str, mx.array], kind: str) -> dict[str, Any]:
    """The report on every key; `UserError` for unknown ones, and for two of the same weight."""
    used, renamed, ignored, unknown, taken = [], {}, {}, [], {}
    for key in weights:
        try:
            name, part, _ = KINDS[kind].keys.find(key)
        except UserError as error:
            unknown.append(str(error))
            continue
        if name is None:
            ignored[key] = KINDS[kind].ignored_because
            continue
        if (name, part) in taken:
            raise UserError(f"{source.path}: '{taken[name, part]}' and '{key}' are the same weight")
        taken[name, part] = key
        if name == key:
            used.append(key)
        else:
            renamed[key] = name
        # Some tools store a LoRA's alpha as a whole number.
        is_alpha = kind == "lora" and key.endswith(".alpha")
        if not is_alpha and not mx.issubdtype(weights[key].dtype, mx.floating):
            raise UserError(
                f"{source.path}: '{key}' is stored as whole numbers, so it is quantized already: "
                "get the original weights"
            )
    if unknown:
        more = f" ({len(unknown)} such keys)" if len(unknown) > 1 else ""
        raise UserError(f"{source.path} is not a {kind}: {unknown[0]}{more}")
    return {"used": used, "renamed": renamed, "ignored": ignored, "missing": []}


def _entries(plan: Plan, dtype: mx.Dtype | None, how: Mapping[str, int] | None) -> list[Entry]:
    """The output's tensors in order; removes the weights from the plan."""
    quantized = set(plan.matrices(how["group_size"])) if how else set()
    if how and not quantized:
        raise UserError(
            f"{how['group_size']} divides the rows of no matrix, so that nothing can be quantized: "
            "choose another group size, or do not quantize"
        )
    entries = []
    for key in list(plan.weights):
        value = plan.weights.pop(key)
        if dtype is not None:
            value = value.astype(dtype)
        layer = key.removesuffix(".weight")
        if how is not None and layer in quantized:
            entries.append(_packed(layer, value, **how))
        else:
            entries.append(lazy(key, value))
    return entries


def _packed(layer: str, value: mx.array, *, bits: int, group_size: int) -> Entry:
    """A matrix packed by `mx.quantize`; the note is |W - W'| / |W|."""
    rows, columns = value.shape
    groups = (rows, columns // group_size)
    shapes = {
        f"{layer}.weight": (mx.uint32, (rows, columns * bits // 32)),
        f"{layer}.scales": (value.dtype, groups),
        f"{layer}.biases": (value.dtype, groups),
    }
    held = [value]

    def make() -> tuple[dict[str, mx.array], Any]:
        exact = held.pop()
        mx.eval(exact)
        pieces, off, norm = [], 0.0, 0.0
        # Rows are packed independently. In pieces, because the error needs float32 copies.
        step = max(1, PIECE // columns)
        for i in range(0, rows, step):
            piece = exact[i : i + step]
            packed = mx.quantize(piece, group_size, bits)
            piece = piece.astype(mx.float32)
            again = mx.dequantize(*packed, group_size=group_size, bits=bits).astype(mx.float32)
            squares = (again - piece).square().sum(), piece.square().sum()
            mx.eval(packed, squares)
            off, norm = off + squares[0].item(), norm + squares[1].item()
            pieces.append(packed)
        parts = [mx.concatenate(list(part)) for part in zip(*pieces, strict=True)]
        return dict(zip(shapes, parts, strict=True)), [layer, (off / (norm or 1.0)) ** 0.5]

    return Entry(shapes, make)
