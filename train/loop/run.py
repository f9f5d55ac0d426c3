"""A run's folder: the record of its settings, and weights to start from."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.hub import BUILT_IN, find_model
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.module import check_fit, shapes
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, whole_file
from train.data.source import MAY_CHANGE
from train.data.text import is_trained
from train.loop.checkpoint import latest_checkpoint, load_ema
from train.objectives.elastic import TextToLatents

SETTINGS = "settings.json"


def claim(
    run_dir: Path,
    settings: dict[str, Any],
    *,
    may_change: Collection[str] = (),
    unrecorded: dict[str, Any] | None = None,
) -> None:
    """Record the settings of a run in its folder; a resumed run must have the same ones.

    Args:
        settings: JSON values.
        may_change: settings that may differ when the run is resumed.
        unrecorded: settings of a run that has checkpoints but no record, as older versions made.

    Raises:
        UserError: the folder holds a run with other settings.
    """
    path = run_dir / SETTINGS
    if latest_checkpoint(run_dir) is not None:
        then = unrecorded if unrecorded is not None and not path.exists() else _read(path)
        if then is None:
            raise UserError(f"{run_dir} holds a run of another kind: give another --run-dir")
        fixed = [name for name in settings if name not in may_change]
        if changed := [name for name in fixed if then.get(name) != settings[name]]:
            raise UserError(
                f"{run_dir} holds a run with other {' and '.join(changed)}: give another "
                "--run-dir, or delete it to start again"
            )
    if mx.distributed.init().rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def claim_data(run_dir: Path, source: dict[str, Any]) -> None:
    """`claim` with the settings of a source; see `MAY_CHANGE`."""
    claim(run_dir, source, may_change=MAY_CHANGE, unrecorded={"data": "stickers"})


def claim_training(run_dir: Path, source: dict[str, Any], *, model: ModelFolder) -> None:
    """`claim` with the settings of a source, see `MAY_CHANGE`, and the model for `train.export`."""
    named = {"model": model_reference(model), "model_name": model.config.name}
    may_change = (*MAY_CHANGE, *named)
    claim(run_dir, source | named, may_change=may_change, unrecorded={"data": "stickers"})


def model_reference(model: ModelFolder) -> str:
    """What `find_model` takes to find a model again from another folder."""
    if model.source is None:
        return BUILT_IN
    return str(model.path.resolve()) if model.revision is None else model.source


def recorded(run_dir: Path) -> dict[str, Any]:
    """The record of a run; empty for a model folder or a run of an older version."""
    return _read(run_dir / SETTINGS) or {}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_folder(path: Path) -> Path:
    """The folder of a run or a model: `path`, or the one that `find_model` returns for it."""
    path = expanded(path)
    return path if path.is_dir() else find_model(str(path))


def load_trained(folder: Path) -> dict[str, Any]:
    """Weights for `TextToLatents` from a model folder, or the averaged ones of a run."""
    if (folder / "config.json").is_file():
        model = load_pretrained(folder)
        encoders = [e.parameters() for e in model.text_encoders if is_trained(e.config)]
        return {"transformer": model.transformer.parameters(), "text_encoders": encoders}
    trained: dict[str, Any] = dict(tree_unflatten(list(load_ema(folder).items())))
    # A run may have trained parts that no model has, such as the projectors of distillation.
    return {name: trained[name] for name in ("transformer", "text_encoders") if name in trained}


def start_from(model: TextToLatents, folder: Path) -> None:
    """Load the weights of a model folder or a run into `model`; `UserError` if they do not fit."""
    weights = load_trained(folder)
    own = {part: model.parameters()[part] for part in ("transformer", "text_encoders")}
    check_fit(shapes(weights), shapes(own), folder, what="this model")
    model.update(weights)
