"""Public checkpoints: find their files, check that they are complete, and read weights lazily.

safetensors are read tensor by tensor when they are needed. A PyTorch pickle is read by torch's
weights-only loader, which runs no code of the file, and spooled into safetensors first.
"""

import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from convert.public.stream import Entry, write_tensors
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SIDE_FILES = ("*.json", "*.txt", "*.txt.gz", "*.model", "*.jinja")

NAMES = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model")
"""Names of weight files in the original libraries; they are preferred to other names."""

MAPPED_BYTES = 2**27
"""Bytes read from a pickle before it is mapped again."""


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

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def weights(self, spool: Path) -> dict[str, mx.array]:
        """All tensors by key, lazy. Pickles are first copied to safetensors in the folder `spool`.

        Raises:
            UserError: a file that is damaged, or more than weights; a key in two files.
        """
        found: dict[str, mx.array] = {}
        for i, path in enumerate(self.files):
            if path.suffix in PICKLES:
                path = spooled(path, spool / f"{i}.safetensors")
            tensors = load_tensors(path)
            if twice := next((key for key in tensors if key in found), None):
                raise UserError(f"{path} has '{twice}', which is also in an earlier file")
            found |= tensors
        return found


def find_source(source: str, revision: str | None = None, subfolder: str | None = None) -> Source:
    """The checkpoint in a folder, a file, or a Hugging Face repository.

    Raises:
        UserError: no such source, a repository that cannot be downloaded, missing files, or several
            checkpoints.
    """
    path = expanded(source)
    if path.is_file():
        if revision or subfolder:
            raise UserError(f"{path} is a file: it has neither revisions nor subfolders")
        if path.suffix not in (".safetensors", *PICKLES):
            known = ", ".join((".safetensors", *PICKLES))
            raise UserError(f"{path} is no checkpoint: give a file ending in one of {known}")
        return Source(path, path.parent, (path,), None)
    inside = f"{subfolder}/" if subfolder else ""
    is_local = path.is_dir()
    folder = find_model(
        source, revision=revision, files=[inside + p for p in (*SIDE_FILES, "*.safetensors")]
    )
    if not is_local and not [*(folder / inside).glob("*.safetensors")]:
        # Only now: many repositories have the same weights in pickles too.
        pickles = [f"{inside}*{suffix}" for suffix in PICKLES]
        folder = find_model(
            source, revision=revision, files=[*(inside + p for p in SIDE_FILES), *pickles]
        )
    folder = folder / inside
    if not folder.is_dir():
        raise UserError(f"{source} has no subfolder {subfolder}")
    files = _weight_files(folder)
    config = None
    if (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
    return Source(path if is_local else folder, folder, files, config)


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
        raise UserError(
            f"{folder} is a whole pipeline: name a part with --subfolder {parts[0]}"
            + (f" (or {', '.join(parts[1:])})" if parts[1:] else "")
        )
    raise UserError(f"{folder} holds no weights: neither .safetensors nor {', '.join(PICKLES)}")


def _indexed(path: Path) -> tuple[Path, ...]:
    """The shards that an index names."""
    index = read_json(path)
    try:
        names = sorted(set(index["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no index of shards: it has no weight_map") from None
    # Only file names: an index must not lead out of its folder.
    files = tuple(path.parent / Path(name).name for name in names)
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"{path.parent} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files" if missing[1:] else "")
            + f", which {path.name} names: get it again"
        )
    return files


def load_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, lazy; `UserError` for one that is damaged."""
    check_whole(path)
    try:
        tensors = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): get it again") from None
    assert isinstance(tensors, dict)
    return tensors


def check_whole(path: Path) -> None:
    """`UserError` unless the safetensors file has the length in its header."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                raise UserError(f"{path} is truncated, or no safetensors file: get it again")
            header = json.loads(file.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, LookupError):
        raise UserError(f"{path} is damaged, or no safetensors file: get it again") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise UserError(f"{path} is truncated: {size} of {whole} bytes, get it again")


def config_of(source: Source) -> dict[str, Any]:
    """config.json of a checkpoint; `UserError` when it has none."""
    if source.config is None:
        raise UserError(f"{source.path} needs the config.json of its folder: give the folder")
    return source.config


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` if there is none."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it holds no object")
    return values


# --- pickles ------------------------------------------------------------------------------------


def spooled(path: Path, target: Path) -> Path:
    """Copy the tensors of a PyTorch pickle to the safetensors file `target`, one by one.

    Raises:
        UserError: torch is not installed, or the file holds more than weights.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path.name} is a PyTorch pickle, which only torch's weights-only loader reads: "
            "pip install torch, or get the checkpoint as .safetensors"
        ) from None
    pickled = _Pickle(path, torch)
    if not pickled.tensors:
        raise UserError(f"{path} holds no weights")
    entries = [_entry(name, t, torch, pickled.take) for name, t in pickled.tensors.items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, entries, target.with_suffix(".journal"))
    return target


class _Pickle:
    """The tensors of a PyTorch pickle.

    Pages read from a mapped file count as memory of the process until it is unmapped, so the file
    is mapped again after every `MAPPED_BYTES`.
    """

    def __init__(self, path: Path, torch: Any) -> None:
        self.path, self.torch = path, torch
        self._open()

    def _open(self) -> None:
        # Unmap the file before mapping it again.
        self.tensors: dict[str, Any] = {}
        self.num_read, self.is_mapped = 0, True
        load = self.torch.load
        try:
            try:
                state = load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before 2020 cannot be memory-mapped
                state = load(self.path, map_location="cpu", weights_only=True)
                self.is_mapped = False
        except pickle.UnpicklingError:
            raise UserError(
                f"{self.path} holds more than weights and was not opened: it could run code"
            ) from None
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.path} is truncated or damaged ({reason}): get it again"
            ) from None
        self.tensors = dict(_tensors(state, self.torch.Tensor))

    def take(self, name: str) -> Any:
        """One tensor; the caller must release it before the next call."""
        if self.is_mapped and self.num_read >= MAPPED_BYTES:
            self._open()
        tensor = self.tensors[name]
        self.num_read += tensor.nbytes
        return tensor


def _tensors(state: Any, kind: type) -> Sequence[tuple[str, Any]]:
    """The weights of a state dict, or of a training checkpoint around one."""
    for key in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            return _tensors(state[key], kind)
    if not isinstance(state, dict):
        return []
    return [(str(k), v) for k, v in state.items() if isinstance(v, kind)]


def _entry(name: str, tensor: Any, torch: Any, take: Callable[[str], Any]) -> Entry:
    types = {
        torch.float64: mx.float32,  # MLX has no float64 on a GPU, and no network needs it
        torch.float32: mx.float32,
        torch.float16: mx.float16,
        torch.bfloat16: mx.bfloat16,
    }
    dtype = types.get(tensor.dtype) or getattr(mx, str(tensor.dtype).removeprefix("torch."), None)
    if tensor.dtype == torch.bool:
        dtype = mx.bool_
    if dtype is None:
        raise UserError(f"'{name}' is of the type {tensor.dtype}, which is not supported")

    def make() -> tuple[dict[str, mx.array], None]:
        plain = take(name).detach().contiguous()
        if dtype == mx.bfloat16:
            return {name: mx.array(plain.view(torch.int16).numpy()).view(dtype)}, None
        return {name: mx.array(plain.numpy()).astype(dtype)}, None

    return Entry({name: (dtype, tuple(tensor.shape))}, make)
