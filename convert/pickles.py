"""PyTorch pickles, copied to safetensors by torch's weights-only loader, which runs no code."""

import contextlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen._interrupts import interrupts_deferred
from mlx_snapgen.errors import UserError
from mlx_snapgen.public.stream import Entry, write_tensors
from mlx_snapgen.reading import check_regular, open_regular

MAPPED_BYTES = 2**27
"""Bytes read from a pickle before it is mapped again."""


def spooled(path: Path, target: Path) -> Path:
    """Copy the tensors of a PyTorch pickle to the safetensors file `target`, one by one.

    Raises:
        UserError: torch is not installed, or the file holds more than weights.
    """
    try:
        with interrupts_deferred():
            import torch
    except ImportError:
        raise UserError(
            f"{path.name} is a PyTorch pickle, which only torch's weights-only loader reads: "
            "pip install torch, or get the checkpoint as .safetensors"
        ) from None
    _check_names(path)
    pickled = _Pickle(path, torch)
    if not pickled.tensors:
        raise UserError(f"{path} holds no weights")
    entries = [_entry(name, t, torch, pickled.take) for name, t in pickled.tensors.items()]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, entries, target.with_suffix(".journal"))
    return target


LONGEST_NAME = 1000
"""Characters of a name in a pickle; torch takes minutes to refuse one of a hundred thousand."""


def _check_names(path: Path) -> None:
    """`UserError` for a pickle with a name that is too long; other damage is left to torch."""
    is_long = False
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        # An old file has four pickles, one after the other.
        files: list[Any] = [stack.enter_context(open(path, "rb", opener=open_regular))] * 4
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [name for name in archive.namelist() if name.endswith(".pkl")]
            files = [stack.enter_context(archive.open(name)) for name in names]
        for file in files:
            for code, argument, _ in pickletools.genops(file):
                if code.name in ("GLOBAL", "INST") and len(str(argument)) > LONGEST_NAME:
                    is_long = True
    if is_long:
        raise UserError(f"{path} is damaged: a name in it is too long: get it again")


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
            check_regular(self.path)
            try:
                state = load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before 2020 cannot be memory-mapped
                state = load(self.path, map_location="cpu", weights_only=True)
                self.is_mapped = False
        except pickle.UnpicklingError:
            raise UserError(
                f"{self.path} holds more than weights and was not opened: it could run code"
            ) from None
        except Exception as error:
            # torch's unpickler raises errors of any kind for a damaged stream.
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
