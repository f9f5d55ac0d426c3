"""A run's folder: what it trains, and weights to start from."""

import json
from pathlib import Path

from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.module import check_fit, shapes
from mlx_snapgen.errors import UserError
from train.loop.checkpoint import latest_checkpoint, load_ema
from train.objectives.elastic import TextToLatents


def load_trained(folder: Path) -> dict:
    """Weights for `TextToLatents` from a model folder, or the averaged ones of a run."""
    if (folder / "config.json").is_file():
        model = load_pretrained(folder)
        encoders = [e.parameters() for e in model.text_encoders]
        return {"transformer": model.transformer.parameters(), "text_encoders": encoders}
    trained = tree_unflatten(list(load_ema(folder).items()))
    # A run may have trained more than a model keeps, such as the projectors of distillation.
    return {name: trained[name] for name in ("transformer", "text_encoders") if name in trained}


def start_from(model: TextToLatents, folder: Path) -> None:
    """Put the weights of a model folder or a run into `model`; a `UserError` if they do not fit."""
    weights = load_trained(folder)
    own = {part: model.parameters()[part] for part in ("transformer", "text_encoders")}
    check_fit(shapes(weights), shapes(own), folder, what="this model")
    model.update(weights)


SETTINGS = "settings.json"


def claim(run_dir: Path, settings: dict) -> None:
    """Note in the run's folder what it trains; `UserError` if it has trained something else."""
    path = run_dir / SETTINGS
    if latest_checkpoint(run_dir) is None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
        return
    try:
        then = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{run_dir} holds a run of another kind: give another --run-dir") from None
    if changed := [name for name in settings if then.get(name) != settings[name]]:
        raise UserError(
            f"{run_dir} holds a run with other {' and '.join(changed)}: give another --run-dir, "
            "or delete it to start again"
        )
