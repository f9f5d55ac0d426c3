"""Write a safetensors file tensor by tensor, so that only one is in memory.

The header comes first and needs only names, types and shapes, which lazy arrays have. A journal
beside the file lists the finished entries, to resume an interrupted conversion.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

TYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.int16: "I16",
    mx.int8: "I8",
    mx.uint8: "U8",
    mx.bool_: "BOOL",
}
"""Floating types, the types of packed weights, and others that PyTorch files may contain."""

SYNC_BYTES = 256 << 20
"""Written between two entries of the journal: the most that an interruption loses."""


@dataclass(frozen=True)
class Entry:
    """Tensors that are computed together, such as the three of a quantized matrix."""

    shapes: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]
    make: Callable[[], tuple[dict[str, mx.array], Any]]
    """Returns the tensors, and a note for the journal, a JSON value."""


def lazy(name: str, value: mx.array) -> Entry:
    """An entry of one array; the caller must not keep another reference to it."""
    held = [value]
    return Entry({name: (value.dtype, value.shape)}, lambda: ({name: held.pop()}, None))


def write_tensors(
    path: Path,
    entries: Sequence[Entry],
    journal: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    sync_bytes: int = SYNC_BYTES,
    progress: Callable[[int], object] = lambda _: None,
) -> list[Any]:
    """Write `entries` to `path`, or resume where `journal` ends; the notes of all entries.

    An existing journal must be of the same entries.

    Args:
        progress: called with the bytes of each entry, including those written earlier.
    """
    head = _header(entries, metadata or {"format": "mlx"})
    done = _read_journal(journal)
    # The file is at least as long as the journal's last entry, unless it was truncated since.
    if not path.exists() or path.stat().st_size < (done[-1][0] if done else 0):
        done = []
    end = done[-1][0] if done else len(head)
    progress(end)
    notes = [note for _, note in done]
    pending, unsynced = [], 0
    with (
        open(path, "r+b" if done else "wb") as file,
        open(journal, "a" if done else "w", encoding="utf-8") as log,
    ):
        if not done:
            file.write(head)
        file.truncate(end)
        file.seek(end)
        for entry in entries[len(done) :]:
            tensors, note = entry.make()
            before = file.tell()
            for name, (dtype, shape) in entry.shapes.items():
                value = mx.contiguous(tensors.pop(name))
                if (value.dtype, value.shape) != (dtype, shape):
                    raise ValueError(f"{name} is {value.dtype} {value.shape}, not {dtype} {shape}")
                # The buffer protocol has no bfloat16.
                raw: Any = value.view(mx.uint16) if dtype == mx.bfloat16 else value
                file.write(memoryview(raw))
                del value
            mx.clear_cache()
            notes.append(note)
            pending.append(json.dumps([file.tell(), note]))
            unsynced += file.tell() - before
            progress(file.tell() - before)
            if unsynced >= sync_bytes or len(notes) == len(entries):
                file.flush()
                os.fsync(file.fileno())
                log.write("".join(f"{line}\n" for line in pending))
                log.flush()
                pending, unsynced = [], 0
    return notes


def write_new(
    path: Path, entries: Sequence[Entry], *, metadata: Mapping[str, str] | None = None
) -> None:
    """`write_tensors` to a new file, without a journal to resume from."""
    journal = path.with_suffix(".journal")
    write_tensors(path, entries, journal, metadata=metadata)
    journal.unlink()


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        for name, (dtype, shape) in entry.shapes.items():
            end = offset + math.prod(shape) * dtype.size
            described[name] = {
                "dtype": TYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_journal(path: Path) -> list[tuple[int, Any]]:
    """(end of the entry in the file, its note) of the entries that are safely on disk."""
    if not path.exists():
        return []
    done = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            end, note = json.loads(line)
        except ValueError:  # cut off in the middle of the line
            break
        done.append((end, note))
    return done
