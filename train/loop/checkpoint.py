"""The folder of a run: `step_N/` checkpoints, each whole or absent, and `log.jsonl`.

A checkpoint is written to `.step_N.partial`, flushed to the disk and renamed, and is renamed again
before it is deleted. So each `step_N` is complete, even if the process is killed. See
`train.loop.trainer` for what makes a resumed run exact.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.module import check_fit, load_weights, shapes
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import has_lock, lock_folder, save_tensors, whole_file
from mlx_snapgen.formats import is_public
from mlx_snapgen.reading import open_regular, read_text
from train.data.open import is_prepared
from train.data.readers.folder import is_picture

TREES = ("model", "ema", "optimizer")
LOG = "log.jsonl"
MOST_PATHS = 10_000
"""In a folder that is no run, to look for a picture among."""
MOST_NAMED = 8
"""Runs in a line."""


def lock_run(run_dir: Path) -> None:
    """Lock a run's folder, see `lock_folder`; `UserError` if another process trains in it."""
    with writing(run_dir):
        locked = has_lock(run_dir) or lock_folder(run_dir)
    if not locked:
        raise UserError(
            f"another process trains in {run_dir}: wait for it, or give another run folder"
        )


@contextlib.contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """`UserError` with the last checkpoint if a file of a run cannot be written in the block."""
    try:
        yield
    except OSError as error:
        saved = latest_checkpoint(run_dir)
        last = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "free some space and" if full else "when it can be,"
        raise UserError(
            f"cannot write to {run_dir} ({error.strerror or error}); {last}: {way_out} run the "
            "same command again to resume"
        ) from None


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((p for p in Path(run_dir).glob("step_*") if p.name[5:].isdigit()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps of training before a checkpoint."""
    return int(checkpoint.name[5:])


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def runs_in(folder: Path) -> list[Path]:
    """The runs with a checkpoint whose folders are in `folder`, such as the user's "runs"."""
    return sorted(path for path in folder.glob("*") if latest_checkpoint(path) is not None)


def trained_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run; `UserError` when there is none, with what the folder is."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is not None:
        return checkpoint
    if inside := runs_in(run_dir):
        names = ", ".join(map(str, inside[:MOST_NAMED])) + ", ..." * (len(inside) > MOST_NAMED)
        raise UserError(f"{run_dir} holds run folders: give one of them, {names}")
    what, paths = None, itertools.islice(run_dir.rglob("*"), MOST_PATHS)
    if is_prepared(str(run_dir)):
        what = "a folder that train.prepare wrote"
    elif is_public(run_dir):
        what = "a folder in diffusers' format"
    elif not (run_dir / "settings.json").exists() and any(map(is_picture, paths)):
        what = "a folder of pictures"
    if what is not None:
        raise UserError(f"{run_dir} is {what}, not of a run or a model: give one of these")
    raise UserError(f"{run_dir} holds no checkpoint: train it first")


def load_ema(run_dir: Path) -> dict[str, mx.array]:
    """Averaged parameters of a run's newest checkpoint, flat; errors as `trained_checkpoint`."""
    return load_weights(trained_checkpoint(run_dir) / "ema.safetensors")


def save_checkpoint(run_dir: Path, trees: Mapping[str, dict], *, state: dict, keep: int) -> Path:
    """Write `step_N` whole or not at all, then delete all but the newest `keep` (0: none).

    Args:
        trees: parameters by the names in `TREES`, nested as the module or optimizer has them.
        state: what else a resumed run needs, as JSON; `state["step"]` is N.

    Raises:
        OSError: it cannot be written, as when the disk is full.
    """
    final = run_dir / f"step_{state['step']}"
    partial = _partial(final)
    remove_partials(run_dir)
    try:
        partial.mkdir(parents=True)
        for name in TREES:
            save_tensors(partial / f"{name}.safetensors", dict(tree_flatten(trees[name])))
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(run_dir)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old.rename(_partial(old)))
    return final


def load_checkpoint(
    checkpoint: Path,
    expected: Mapping[str, dict],
    *,
    split_optimizer: Callable[[dict[str, mx.array]], dict[str, mx.array]],
    check: Callable[[dict], None] = lambda state: None,
) -> tuple[dict, dict]:
    """Read a checkpoint into memory.

    Args:
        expected: trees like those saved; names and shapes must agree.
        split_optimizer: see `Optimizers.split`.
        check: called with the state before the trees are compared.

    Returns:
        trees by name, nested like the expected ones, and the state.

    Raises:
        UserError: it is damaged or belongs to another model.
    """
    try:
        trees, state = _read(checkpoint)
    except _DAMAGE as error:
        good = [c for c in checkpoints(checkpoint.parent) if c != checkpoint and _is_whole(c)]
        way_out = f"delete it to resume from {good[-1]}" if good else "delete it to start again"
        raise UserError(f"{checkpoint} is damaged ({_line(error)}): {way_out}") from None
    check(state)
    trees["optimizer"] = split_optimizer(trees["optimizer"])
    for name, tree in trees.items():
        where, what = checkpoint / f"{name}.safetensors", "this model (use another run folder)"
        check_fit(shapes(tree), shapes(expected[name]), where, what=what)
    return {name: dict(tree_unflatten(list(tree.items()))) for name, tree in trees.items()}, state


_DAMAGE = (UserError, OSError, ValueError, RuntimeError, KeyError, TypeError, RecursionError)


def _read(checkpoint: Path) -> tuple[dict[str, dict[str, mx.array]], dict]:
    # Of this package, and a number in it may be NaN.
    state = json.loads(read_text(checkpoint / "state.json"))
    if not isinstance(state["step"], int) or not isinstance(state["training"], dict):
        raise ValueError("state.json has no step or no training settings")
    trees: dict[str, Any] = {
        name: load_weights(checkpoint / f"{name}.safetensors") for name in TREES
    }
    # Loaded arrays are lazy: read them while damage can still be reported, and the files exist.
    mx.eval(trees)
    return trees, state


def _is_whole(checkpoint: Path) -> bool:
    try:
        _read(checkpoint)
    except _DAMAGE:
        return False
    return True


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def remove_partials(run_dir: Path) -> None:
    """Delete partial checkpoints of a process that was killed while it saved or deleted them."""
    for path in run_dir.glob(".step_*.partial"):
        shutil.rmtree(path)


def _partial(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _flush(path: Path) -> None:
    """Write a file's contents or a folder's entries to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def append_log(run_dir: Path, entry: dict) -> None:
    """Add a line to the run's log."""
    with open(run_dir / LOG, "a", opener=open_regular) as f:
        f.write(json.dumps(entry) + "\n")


def read_log(run_dir: Path) -> list[dict]:
    """The run's log; an incomplete last line is ignored. `UserError` for a damaged one."""
    path = run_dir / LOG
    lines = read_text(path).split("\n")[:-1] if path.exists() else []
    entries = [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return [entry for entry in entries if entry]


def _entry(line: str, where: str) -> dict:
    # A loss that is not finite is NaN in the log, which is no JSON.
    try:
        values = json.loads(line) if line.strip() else {}
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or (values and not isinstance(values.get("step"), int)):
        raise UserError(f"{where} is damaged: delete the line")
    return values


def rewind_log(run_dir: Path, is_kept: Callable[[dict], bool]) -> None:
    """Remove the entries that are not kept, such as those that a resumed run logs again."""
    if (run_dir / LOG).is_file():
        kept = [json.dumps(e) + "\n" for e in read_log(run_dir) if is_kept(e)]
        with whole_file(run_dir / LOG) as partial:
            partial.write_text("".join(kept))
