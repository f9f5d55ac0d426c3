"""Run folders of the training commands, which are not models."""

from pathlib import Path

from mlx_snapgen.errors import UserError
from mlx_snapgen.reading import read_object

SETTINGS = "settings.json"
"""The record of a run, in its folder."""
OPTIONS = "options"
"""Setting with the options that a resumed run may change, which prints a line."""
RUNS = {
    "few_step": "train.kdmd",
    "rank": "train.lora",
    "average_bits": "train.palettes",
    "autoencoder": "train.autoencoder",
    "teacher_digest": "train.kd",
    "mask_ratio": "train.flow",
}
"""Setting or option in the record of a run -> its command, the first that is there."""
OTHER_RUNS = {
    "train.autoencoder": "give it to train.new --autoencoder",
    "train.kdmd": "give train.export a --model, and with --few-step-lora the LoRA file that it "
    "wrote",
    "train.lora": "draw with the LoRA file that it wrote, generate --lora FILE",
    "train.palettes": "its model is the folder of its --output",
}
"""Command that trains no model to export -> what to do with its run."""


def command_of(run_dir: Path) -> str | None:
    """The command that trained a run; None if there is no run or no record of it."""
    path = run_dir / SETTINGS
    record = read_object(path, paths=True) if path.exists() else {}
    options = record.get(OPTIONS)
    names = {*record, *(options if isinstance(options, dict) else ())}
    if "model" in record:
        names.discard("autoencoder")  # earlier versions of train.flow recorded theirs
    return next((command for name, command in RUNS.items() if name in names), None)


def check_is_no_run(folder: Path) -> None:
    """`UserError` for a run folder that is given as a model, with what to do."""
    if any(folder.glob("step_*")) and (folder / SETTINGS).is_file():
        if (command := command_of(folder)) in OTHER_RUNS:
            raise UserError(f"{folder} is a run of {command}: {OTHER_RUNS[command]}")
        raise UserError(f"{folder} is a run folder: python -m train.export --run {folder} first")
