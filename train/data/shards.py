"""A shard of a prepared set: a safetensors file with the samples of one chunk of records.

It has the samples of each part ("train" or "validation") and bucket together:

    PART/HxW/latents             (N, h, w, C) float16; HxW is the picture's size in pixels
    PART/HxW/latents/NAME        the same, by another autoencoder, such as "teacher"
    PART/HxW/keys                text
    PART/HxW/captions/COLUMN     text
    PART/HxW/states/NAME/COLUMN  (T, D) text states, cut to the tokens of each caption; bfloat16
                                 if the encoder computes in that, float16 otherwise
    skipped, changed             UTF-8: lines of JSON, for report.json
    sizes                        int32 (R, 2): height and width of each picture that was decoded

A text is UTF-8 bytes, all rows one after the other. Texts and states have an array NAME/offsets,
int64 (N + 1,): where each row starts.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file
from mlx_snapgen.picture_files import Size
from mlx_snapgen.reading import open_regular, parse_json
from mlx_snapgen.tensor_files import check_entry
from train.data.selection import held_out as is_held_out

INDEX, SETTINGS, SHARDS = "index.json", "settings.json", "shards"
"""In the folder of a set; the first is missing if the set is not complete."""
TRAIN, VALIDATION = "train", "validation"

States = Mapping[str, Mapping[str, np.ndarray]]
"""Text encoder -> caption column -> states (L, D)."""


@dataclass(frozen=True)
class Sample:
    """An encoded picture.

    Attributes:
        key: of its record.
        size: of the picture's bucket, in pixels.
        captions: column -> caption, "" where there is none.
        latents: normalized latents (h, w, C) float16.
        states: float16, or bfloat16 as uint16.
        other_latents: name of another autoencoder -> its latents.
        group: the samples of a group are held out together; "" for `key` alone.
    """

    key: str
    size: Size
    captions: Mapping[str, str]
    latents: np.ndarray
    states: States = field(default_factory=dict)
    other_latents: Mapping[str, np.ndarray] = field(default_factory=dict)
    group: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays and captions."""
        states = [rows for columns in self.states.values() for rows in columns.values()]
        arrays = [self.latents, *self.other_latents.values(), *states]
        return sum(x.nbytes for x in arrays) + sum(len(c.encode()) for c in self.captions.values())


DTYPES = {
    "F16": np.float16,
    "BF16": np.uint16,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
"""Type in a safetensors file -> numpy's, which has no bfloat16."""
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def write_shard(
    path: Path,
    samples: Sequence[Sample],
    *,
    held_out: float,
    skipped: Sequence[Mapping[str, str]] = (),
    changed: Mapping[str, int] | None = None,
    sizes: Sequence[Size] = (),
    settings: str = "",
) -> None:
    """Write a chunk's samples, whole or not at all; equal arguments give equal bytes.

    Args:
        held_out: share of the samples for validation.
        skipped: {"key", "reason", "detail"} of each record that has no sample.
        changed: what was changed in pictures -> how many.
        sizes: see the module.
        settings: hash of the settings of `train.prepare`.

    Raises:
        UserError: it cannot be written, as when the disk is full.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        part = VALIDATION if is_held_out(sample.group or sample.key, held_out) else TRAIN
        groups.setdefault(group_name(part, sample.size), []).append(sample)
    tensors: dict[str, list[np.ndarray]] = {}
    for name in sorted(groups):
        tensors |= _group_tensors(name, groups[name])
    for name, lines in (("skipped", skipped), ("changed", [changed] if changed else [])):
        texts = (json.dumps(line, sort_keys=True) + "\n" for line in lines)
        tensors[name] = [_bytes("".join(texts))]
    tensors["sizes"] = [np.array(sizes, np.int32).reshape(-1, 2)]
    try:
        with whole_file(path) as partial:
            save_arrays(partial, tensors, metadata={"format": "prepared", "settings": settings})
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """One line on a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {path.parent} is full: free some space and run the same command again "
            "to resume"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}")


def group_name(part: str, size: Size) -> str:
    """Start of the names of the arrays of a part and bucket."""
    return f"{part}/{size[0]}x{size[1]}"


def _group_tensors(group: str, samples: Sequence[Sample]) -> dict[str, list[np.ndarray]]:
    first = samples[0]
    tensors = {f"{group}/latents": [sample.latents[None] for sample in samples]}
    for name in first.other_latents:
        tensors[f"{group}/latents/{name}"] = [s.other_latents[name][None] for s in samples]
    rows = {"keys": [_bytes(sample.key) for sample in samples]}
    for column in first.captions:
        rows[f"captions/{column}"] = [_bytes(sample.captions[column]) for sample in samples]
    for name, columns in first.states.items():
        for column in columns:
            rows[f"states/{name}/{column}"] = [s.states[name][column] for s in samples]
    for name, arrays in rows.items():
        ends = np.cumsum([0, *map(len, arrays)]).astype(np.int64)
        tensors |= {f"{group}/{name}/offsets": [ends], f"{group}/{name}": arrays}
    return tensors


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)


def save_arrays(
    path: Path, tensors: Mapping[str, list[np.ndarray]], *, metadata: Mapping[str, str]
) -> None:
    """A safetensors file; each tensor is given as parts along its first dimension."""
    # Offsets of 8 bytes first, so that everything is aligned.
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        parts = tensors[name]
        end = position + sum(part.nbytes for part in parts)
        header[name] = {
            "dtype": NAMES[parts[0].dtype],
            "shape": [sum(map(len, parts)), *parts[0].shape[1:]],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in tensors[name]:
                file.write(np.ascontiguousarray(part).data)
        file.flush()
        os.fsync(file.fileno())


def shard_path(folder: Path, chunk: int) -> Path:
    """The file of a chunk."""
    return folder / SHARDS / f"{chunk:06d}.safetensors"


class Shard:
    """An open shard, from which rows are read.

    Files are read, not mapped: a file that gets shorter while it is mapped would end the process.

    Raises:
        UserError: the file is missing, damaged, or not of this format; also from its methods.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Without `__del__`, in which Python would ignore Ctrl-C: the file closes itself.
            self._file = open(path, "rb", buffering=0, opener=open_regular)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({error.strerror}): run train.prepare again, or get the file"
            ) from None
        try:
            length = int.from_bytes(self._read(0, 8), "little")
            if not 0 < length < 2**30:
                raise self._damaged()
            header = parse_json(self._read(8, length), path)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            if not all(isinstance(text, str) for text in self.metadata.values()):
                raise ValueError
            self._entries: dict[str, Any] = header
            for entry in header.values():
                check_entry(entry)
                if entry["dtype"] not in DTYPES:
                    raise ValueError
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (UserError, ValueError, LookupError, TypeError, AttributeError):
            raise self._damaged() from None
        self._start = 8 + length
        if os.fstat(self._file.fileno()).st_size != self._start + end:
            raise self._damaged()

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; dropping the last reference does so too."""
        self._file.close()

    def _damaged(self) -> UserError:
        return UserError(f"{self.path} is damaged: delete it, and run train.prepare again")

    def _read(self, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), count, offset)
            while len(data) < count:
                more = os.pread(self._file.fileno(), count - len(data), offset + len(data))
                if not more:
                    raise self._damaged()
                data += more
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        return data

    def count(self, group: str) -> int:
        """Samples of a part and bucket."""
        entry = self._entries.get(f"{group}/latents")
        return entry["shape"][0] if entry else 0

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """These rows of an array; float32 for bfloat16."""
        entry = self._entries.get(name)
        if entry is None:
            raise UserError(f"{self.path} has no {name}: delete it, and run train.prepare again")
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
        end: int = shape[0] if stop is None else stop
        if not 0 <= start <= end <= shape[0]:
            raise self._damaged()
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        position = self._start + entry["data_offsets"][0] + start * size
        data = self._read(position, (end - start) * size)
        found = np.frombuffer(data, dtype).reshape(end - start, *shape[1:])
        if entry["dtype"] == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return found

    def row(self, name: str, row: int) -> np.ndarray:
        """One row of an array that has offsets."""
        start, stop = self.rows(f"{name}/offsets", row, row + 2)
        return self.rows(name, int(start), int(stop))

    def text(self, name: str, row: int) -> str:
        """One row of a text."""
        return self.row(name, row).tobytes().decode(errors="surrogateescape")

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of "skipped" or "changed", JSON objects; `UserError` for others."""
        try:
            # Names of files may have bytes that are no text, which `parse_json` refuses.
            lines = [json.loads(line) for line in self.rows(name).tobytes().splitlines()]
        except (ValueError, RecursionError):
            raise self._damaged() from None
        if not all(isinstance(line, dict) for line in lines):
            raise self._damaged()
        return lines
