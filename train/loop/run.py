"""A run's folder: the record of its settings, and weights to start from."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.module import check_fit, load_weights, shapes
from mlx_snapgen.checkpoint.runs import OPTIONS, SETTINGS, command_of
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.reading import open_regular, read_object
from mlx_snapgen.settings import BUILT_IN
from train.data.source import MAY_CHANGE
from train.data.text import is_trained
from train.loop.assemble import check_converted
from train.loop.checkpoint import latest_checkpoint, load_ema, lock_run, step_of, writing
from train.loop.config import TrainingConfig, changed, changes, name_of, shown
from train.loop.distributed import print_once
from train.objectives.elastic import TextToLatents

WEIGHTS = ("*.safetensors", "*.json", "*.model", "text_encoder/*")
"""Patterns of the files of a model folder or a teacher's."""
NETWORKS = "networks"
"""Setting with the configs of the networks that are trained."""
MODEL = "model"
"""Setting with the model of a run; another path may have the same one."""
PLACES = (MODEL, "specs")
"""Settings that say where something is, which may have moved."""
OTHERS = ("config.json", "index.json", "shards")
"""In folders of models and of prepared pictures, not of runs."""
KEYS_OF_OTHERS = ("records_in_shard", "attention_modulation")
"""In settings.json of `train.prepare`, and of the prompt lists of `train.evaluate`."""
RESUMING = "resuming with other settings"
BLOCK, BLOCKS = 1 << 14, 64
"""Bytes of a block, and blocks of a large file, that `digest_files` reads."""


def claim(
    run_dir: Path,
    settings: dict[str, Any],
    *,
    steps: int | None = None,
    may_change: Collection[str] = (),
    newer: Collection[str] = (),
    unrecorded: dict[str, Any] | None = None,
) -> None:
    """Record the settings of a run in its folder; a resumed run must have the same ones.

    A run that is complete keeps its record, but for `PLACES`.

    Args:
        settings: JSON values.
        steps: of the run; None if no settings may change.
        may_change: settings that may differ when the run is resumed.
        newer: settings that runs of older versions did not record; only then they may differ.
        unrecorded: settings of a run that has checkpoints but no record, as older versions made.

    Raises:
        UserError: the folder holds a run with other settings, or one that is being trained.
    """
    path, is_main = run_dir / SETTINGS, mx.distributed.init().rank() == 0
    if is_main:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        lock_run(run_dir)
    if (checkpoint := latest_checkpoint(run_dir)) is not None:
        then = unrecorded if unrecorded is not None and not path.exists() else _read(path)
        if then is None:
            raise UserError(f"{run_dir} holds a run of another kind: give another --run-dir")
        free = {*may_change, *(name for name in newer if name not in then)}
        fixed = [name for name in settings if name not in free]
        different = changed(then, settings, fixed)
        if "data" in different:
            different = ["data"]  # the others follow from it
        if different:
            raise UserError(
                f"{run_dir} holds a run with other {' and '.join(different)}: give another "
                "--run-dir, or delete it to start again"
            )
        how = RESUMING
        if steps is not None and step_of(checkpoint) >= steps:
            how = f"recorded in {run_dir}, which is complete"
            if new := changes(then.get(OPTIONS, {}), settings.get(OPTIONS, {})):
                print_once(f"without effect, because {run_dir} is complete: {new}")
            settings = then | {name: settings[name] for name in PLACES if name in settings}
        before, now = (
            {n: s[n] for n in (MODEL,) if n in s} | s.get(OPTIONS, {}) for s in (then, settings)
        )
        if new := changes(before, now):
            print_once(f"{how}: {new}")
    if is_main:
        with writing(run_dir), whole_file(path) as partial:
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def check_no_run(folder: Path) -> None:
    """`UserError` for a folder of a run, where something else is to be written."""
    command = command_of(folder)
    if command is not None or latest_checkpoint(folder) is not None:
        what = "a training run" if command is None else f"a run of {command}"
        raise UserError(f"{folder} holds {what}: give another folder")


def check_run_folder(run_dir: Path, command: str) -> None:
    """`UserError` for a folder of something else, whose files a run would mix with its own.

    Args:
        command: that trains in the folder, such as "train.flow".
    """
    has_begun, path = latest_checkpoint(run_dir) is not None, run_dir / SETTINGS
    found = None
    if not has_begun:
        found = next((name for name in OTHERS if (run_dir / name).exists()), None)
        if path.exists() and any(key in recorded(run_dir) for key in KEYS_OF_OTHERS):
            found = found or SETTINGS
    if found is not None:
        raise UserError(f"{run_dir} holds no run, but {found} of something else: give a new folder")
    if (other := command_of(run_dir)) not in (None, command):
        instead = "" if has_begun else ", or delete it: it has no checkpoint yet"
        raise UserError(f"{run_dir} holds a run of {other}: give another folder{instead}")


def claim_training(
    run_dir: Path,
    source: dict[str, Any],
    *,
    steps: int,
    model: ModelFolder,
    trained: nn.Module,
    sampling: dict[str, Any],
    fixed: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """`claim` with the settings of a source, see `MAY_CHANGE`, and those for `train.export`.

    Args:
        trained: the networks to train; those of an earlier checkpoint must have the same sizes.
        sampling: "image_size", "trained_sizes" and "time_shift" of the exported model.
        fixed: what else a resumed run must have in common.
        options: see `OPTIONS`.
    """
    check_sizes(run_dir, trained)
    used = {MODEL: model_reference(model), "model_name": model.config.name} | sampling
    used |= {OPTIONS: options}
    fixed = fixed | {NETWORKS: _describe_networks(model.config, run_dir)}
    claim(
        run_dir,
        source | used | fixed,
        steps=steps,
        may_change=(*MAY_CHANGE, *used),
        newer=fixed,
        unrecorded={"data": "stickers"},
    )


def _describe_networks(config: ModelConfig, run_dir: Path) -> list[dict[str, Any]]:
    """The configs of the networks to train, as the run recorded them if these are the same.

    Configs of the same sizes may differ, such as in the number of heads.
    """
    configs = [config.transformer, *(c for c in config.text_encoders if is_trained(c))]
    before = recorded(run_dir).get(NETWORKS)
    if isinstance(before, list) and len(before) == len(configs):
        # The same, also if they were recorded with fewer fields.
        with naming(run_dir / SETTINGS):
            found = [from_dict(type(c), d) for c, d in zip(configs, before, strict=True)]
        if found == configs:
            return before
    return [to_dict(c) for c in configs]


def check_same(run_dir: Path, used: dict[str, Any]) -> None:
    """`UserError` for options that must be those of the run, because they choose its networks.

    Args:
        used: some of `OPTIONS`; older runs did not record all.
    """
    then = recorded(run_dir).get(OPTIONS)
    if latest_checkpoint(run_dir) is None or not isinstance(then, dict):
        return
    for name in used:
        if name in then and _unordered(then[name]) != _unordered(used[name]):
            before, now = (f"{name_of(name)} {shown(value)}" for value in (then[name], used[name]))
            raise UserError(
                f"{run_dir} was trained with {before}, not with {now}: give {before} to resume it, "
                "or another --run-dir"
            )


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


def check_sizes(run_dir: Path, trained: nn.Module) -> None:
    """`UserError` if the checkpoint of a run is of other networks.

    It comes before `claim`, which replaces the record.
    """
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return
    path = checkpoint / "model.safetensors"
    try:
        weights = load_weights(path)
    except UserError:
        return  # the trainer reports a damaged checkpoint
    what = "this model (use another run folder)"
    check_fit(shapes(weights), shapes(trained.trainable_parameters()), path, what=what)


def check_resumed(
    checkpoint: Path, state: dict[str, Any], *, config: TrainingConfig, processes: int
) -> None:
    """Refuse settings that change the data of later steps, or the state; print others.

    Args:
        state: of the checkpoint.
        processes: of the job that resumes.
    """
    now = json.loads(json.dumps(asdict(config)))
    # Missing settings take today's defaults; old checkpoints take those of their version.
    then = now | {"accumulate": 1} | state["training"]
    for name in ("batch_size", "seed", "optimizer"):
        if then[name] != now[name]:
            raise UserError(
                f"{checkpoint} was trained with {name_of(name)} {then[name]}, not "
                f"{now[name]}: give {then[name]}, or another run folder"
            )
    shares = then["accumulate"] * state.get("processes", processes)
    if shares != now["accumulate"] * processes:
        raise UserError(
            f"{checkpoint} was trained with {shares} micro-batches a step (processes x "
            f"--accumulate), not {processes} x {now['accumulate']}: change either, or give "
            "another run folder"
        )
    silent = {"accumulate", "checkpoint_every", "keep_checkpoints", "log_every"}
    if new := changes(then, {k: v for k, v in now.items() if k not in silent}):
        is_complete = step_of(checkpoint) >= config.steps
        complete = f"without effect, because {checkpoint.parent} is complete"
        print_once(f"{complete if is_complete else RESUMING}: {new}")


def model_reference(model: ModelFolder) -> str:
    """What `find_model` takes to find a model again from another folder."""
    if model.source is None:
        return BUILT_IN
    return str(model.path.resolve()) if model.revision is None else model.source


def digest_files(folder: Path, patterns: Sequence[str] = WEIGHTS) -> str:
    """A hash of the names and sizes of a model's files and of evenly spaced parts of each.

    It takes a fraction of a second for any size, and differs for other weights: training changes
    every part of a file.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.name.startswith(".") or not path.is_file():
            continue
        size = path.stat().st_size
        state.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        for part in _parts(path, size):
            state.update(part)
    return state.hexdigest()


def digest_path(path: Path) -> str:
    """`digest_files` of a folder, or the same of one file, whatever its name."""
    if path.is_dir():
        return digest_files(path)
    state = hashlib.blake2b(digest_size=16)
    for part in _parts(path, path.stat().st_size):
        state.update(part)
    return state.hexdigest()


def _parts(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb", opener=open_regular) as file:
        starts = range(0, size, BLOCK)
        if len(starts) > BLOCKS:
            starts = [k * (size - BLOCK) // (BLOCKS - 1) for k in range(BLOCKS)]
        for start in starts:
            file.seek(start)
            yield file.read(BLOCK)


def digest_model(model: ModelFolder) -> str:
    """`digest_files` of a loaded model with its public text encoders."""
    sources = [digest_files(path) for path in model.sources.values()]
    return hashlib.blake2b("".join([digest_files(model.path), *sources]).encode()).hexdigest()[:32]


def recorded(run_dir: Path) -> dict[str, Any]:
    """The record of a run; empty for a model folder or a run of an older version."""
    return _read(run_dir / SETTINGS) or {}


def _read(path: Path) -> dict[str, Any] | None:
    return read_object(path, paths=True) if path.exists() else None


def find_folder(path: Path) -> Path:
    """The folder of a run or a model: `path`, or the one that `find_model` returns for it."""
    path = expanded(path)

    def check(folder: Path) -> None:
        check_converted(folder, path)
        if "format_version" not in (_read(folder / "config.json") or {}):
            raise UserError(
                f"the repository {path} is no model of mlx_snapgen, and no autoencoder of "
                "convert.from_torch"
            )

    return path if path.is_dir() else find_model(str(path), check=check)


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
