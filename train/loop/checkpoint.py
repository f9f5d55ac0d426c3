"""The folder of a run: `step_N/` checkpoints, each whole or absent, and `log.jsonl`.

A checkpoint is written to `.step_N.partial`, flushed to the disk and renamed, and is renamed again
before it is deleted. So each `step_N` is complete, even if the process is killed. See
`train.loop.trainer` for what makes a resumed run exact.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.module import check_fit, load_weights, shapes
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file

TREES = ("model", "ema", "optimizer")


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in Path(run_dir).glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def load_ema(run_dir: Path) -> dict[str, mx.array]:
    """Averaged parameters of a run's newest checkpoint, flat; `UserError` when there is none."""
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise UserError(f"{run_dir} holds no checkpoint: train it first")
    return load_weights(checkpoint / "ema.safetensors")


def save_checkpoint(run_dir: Path, trees: Mapping[str, dict], *, state: dict, keep: int) -> Path:
    """Write `step_N` whole or not at all, then delete all but the newest `keep` (0: none).

    Args:
        trees: parameters by the names in `TREES`, nested as the module or optimizer has them.
        state: what else a resumed run needs, as JSON; `state["step"]` is N.
    """
    final = run_dir / f"step_{state['step']}"
    partial = _partial(final)
    remove_partials(run_dir)
    partial.mkdir(parents=True)
    for name in TREES:
        mx.save_safetensors(str(partial / f"{name}.safetensors"), dict(tree_flatten(trees[name])))
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in (*partial.iterdir(), partial):
        _flush(path)
    partial.rename(final)
    _flush(run_dir)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old.rename(_partial(old)))
    return final


def load_checkpoint(
    checkpoint: Path,
    expected: Mapping[str, dict],
    *,
    split_optimizer: Callable[[dict[str, mx.array]], dict[str, mx.array]],
) -> tuple[dict, dict]:
    """Read a checkpoint into memory.

    Args:
        expected: trees like those saved; names and shapes must agree.
        split_optimizer: see `Optimizers.split`.

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
    trees["optimizer"] = split_optimizer(trees["optimizer"])
    for name, tree in trees.items():
        where, what = checkpoint / f"{name}.safetensors", "this model (use another run folder)"
        check_fit(shapes(tree), shapes(expected[name]), where, what=what)
    return {name: dict(tree_unflatten(list(tree.items()))) for name, tree in trees.items()}, state


_DAMAGE = (OSError, ValueError, RuntimeError, KeyError, TypeError)


def _read(checkpoint: Path) -> tuple[dict[str, dict[str, mx.array]], dict]:
    state = json.loads((checkpoint / "state.json").read_text())
    if not isinstance(state["step"], int) or not isinstance(state["training"], dict):
        raise ValueError("state.json has no step or no training settings")
    trees: dict[str, Any] = {
        name: mx.load(str(checkpoint / f"{name}.safetensors")) for name in TREES
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
    with open(run_dir / "log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")


def read_log(run_dir: Path) -> list[dict]:
    """The run's log; an incomplete last line is ignored."""
    path = run_dir / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rewind_log(run_dir: Path, step: int) -> None:
    """Remove entries after `step`, which a resumed run logs again."""
    if (run_dir / "log.jsonl").is_file():
        kept = [json.dumps(e) + "\n" for e in read_log(run_dir) if e["step"] <= step]
        with whole_file(run_dir / "log.jsonl") as partial:
            partial.write_text("".join(kept))
