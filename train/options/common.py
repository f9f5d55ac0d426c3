"""Options and checks that several commands share."""

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlx_snapgen.cli.options import BASE_HELP, finite_number, integer, option_of
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_writable, expanded
from mlx_snapgen.settings import Width, check_width, held_widths
from train.data.open import is_stickers
from train.loop.config import TrainingConfig
from train.loop.run import check_run_folder


def add_run_dir(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """`--run-dir`; required without a default."""
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        "--run-dir",
        type=partial(_run_folder, command=parser.prog.split()[-1]),
        required=default is None,
        metavar="DIR",
        help="folder for the checkpoints, log.jsonl, loss.png and sample pictures; name the "
        f"folder of an earlier run to resume it{shown}",
    )


def _run_folder(text: str, command: str) -> Path:
    try:
        folder = expanded(text)
        check_writable(folder)
        check_run_folder(folder, command)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return folder


TEACHER_HELP = (
    "model folder, folder of convert.teacher, or public model as for generate --model, which is "
    "converted first"
)


def add_teacher_source(parser: argparse._ActionsContainer) -> None:
    """`--teacher-revision` and `--teacher-base`, of a teacher that is a public model."""
    parser.add_argument(
        "--teacher-revision",
        metavar="REV",
        help="branch, tag or commit of the teacher's repository (default: main)",
    )
    parser.add_argument("--teacher-base", metavar="MODEL", help=BASE_HELP)


def add_output(parser: argparse.ArgumentParser, text: str, *, required: bool = True) -> None:
    """`--output`; its help starts with `text`."""
    parser.add_argument(
        "--output",
        "-o",
        type=Path,
        required=required,
        metavar="PATH",
        help=f"{text}; must not exist",
    )


NUM_PREVIEWS = 8
"""Pictures to draw after a checkpoint by default."""
MOST = 10**9
"""The largest whole number of an option; steps and batches are 32-bit numbers in places."""
MOST_RANK = 2**16
"""The largest rank of a LoRA; no layer of a network is as wide."""
MOST_SEED = 10**13
"""The largest seed of a run: a million times it is still a 64-bit number."""


def add_number(
    parser: argparse._ActionsContainer,
    name: str,
    default: Any,
    text: str,
    *,
    most: int = MOST,
    public: float | None = None,
) -> None:
    """A number of the default's type, finite and in size at most `most`.

    With another default for public models, it is None if it is not given.
    """
    also = "" if public is None else f"; for a public model {public:g}"
    parser.add_argument(
        name,
        type=integer(-most, most) if isinstance(default, int) else finite_number,
        default=default if public is None else None,
        metavar="N",
        help=f"{text} (default: {default:g}{also})",
    )


def add_optimizer(parser: argparse.ArgumentParser, default: str) -> None:
    """`--optimizer`."""
    parser.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default=default,
        help="optimizer; muon needs fewer steps, but on a CPU a step of a transformer takes 1/3 "
        "longer (default: %(default)s)",
    )


def add_channel_weights(parser: argparse.ArgumentParser) -> None:
    """`--channel-weights`, see `channel_weights`; `check_channel_weights` has its limits."""
    add_number(
        parser,
        "--channel-weights",
        0.0,
        "weigh the channels of the latents in the losses by what each changes in the decoded "
        "picture, to this power; 0.5 removes blocks where few channels hold most of the picture, "
        "as those of train.autoencoder; 0 weighs all alike",
    )


def check_channel_weights(args: argparse.Namespace) -> None:
    """`UserError` for a power that is not between 0 and 1."""
    check_at_least(args, 0, "channel_weights")
    check_at_most(args, 1, "channel_weights")


def add_removed(parser: argparse.ArgumentParser, removed: Mapping[str, str]) -> None:
    """Options of earlier versions: name -> what to do instead, which is the error."""
    for name, instead in removed.items():
        parser.add_argument(
            name, nargs="*", action=_Removed, help=argparse.SUPPRESS, metavar=instead
        )


REMOVED_OF_STICKERS = {
    "--num-nouns": "give --data stickers:nouns=N",
    "--categories": "give --data stickers:categories=NAME+NAME",
}


class _Removed(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise UserError(f"{option_string} was removed: {self.metavar}")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """`--seed`."""
    add_number(parser, "--seed", 0, "seed of all random numbers", most=MOST_SEED)


def check_at_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """`UserError` if one of these options is below `least`; None is not checked."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            must = "must not be negative" if least == 0 else f"must be at least {least:g}"
            raise UserError(f"{option_of(name)} {must}, got {value}")


def check_at_most(args: argparse.Namespace, most: float, *names: str) -> None:
    """`UserError` if one of these options is above `most`; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value > most:
            raise UserError(f"{option_of(name)} must be at most {most:g}, got {value}")


def check_learning_rate(rate: float | None) -> None:
    """`UserError` for a --learning-rate that no run can have; None passes."""
    if rate is not None and not 0 < rate < 1:
        raise UserError(f"--learning-rate must lie between 0 and 1, got {rate}")


def widths_of(args: argparse.Namespace, config: Description) -> list[Width]:
    """The widths to train, the widest first; `UserError` for one that the model does not have."""
    held = held_widths(config)
    chosen = [check_width(config, name) for name in args.model_widths or ()]
    return [width for width in held if not chosen or width in chosen]


def validation_batch(args: argparse.Namespace) -> int:
    """Pictures at a time after a checkpoint: no more than fit into the memory of a step."""
    return min(16, args.batch_size)


def check_outside(option: str, path: Path, *, sources: Iterable[str | Path]) -> None:
    """`UserError` if the file or folder of an option is a folder of pictures, or inside one."""
    for source in (expanded(source) for source in sources if not is_stickers(str(source))):
        if not source.is_dir() or not path.resolve().is_relative_to(source.resolve()):
            continue
        where = "has" if path.resolve() == source.resolve() else f"is inside {source}, which has"
        what = "name" if path.suffix in FILES else "folder"
        raise UserError(f"{option} {path} {where} the pictures: give a {what} elsewhere")


FILES = (".safetensors", ".model", ".png")
"""What the names of single files that commands write end with."""


def check_new_file(output: Path) -> None:
    """`UserError` if the file `output` exists or cannot be created; `check_new` is for folders."""
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output or delete it")
    check_writable(output.parent)


def check_new_lora(output: Path, *, dry_run: bool = False) -> None:
    """`UserError` unless `output` is a name for a LoRA file, and new unless nothing is written."""
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: give a name ending in .safetensors")
    if not dry_run:
        check_new_file(output)


# --- fine-tuning --------------------------------------------------------------------------------


TUNING = {
    "steps": "training steps",
    "batch_size": "pictures per batch",
    "learning_rate": "AdamW learning rate",
    "checkpoint_every": "steps between checkpoints",
}


def add_tuning(
    parser: argparse.ArgumentParser, own: Mapping[str, Any], public: Mapping[str, Any] | None = None
) -> None:
    """The options of `tuning_config`; `own` has their defaults, `public` those of public models."""
    for name, text in TUNING.items():
        add_number(parser, option_of(name), own[name], text, public=(public or {}).get(name))
    add_seed(parser)


def check_alpha(args: argparse.Namespace) -> None:
    """`UserError` for an --alpha with which a LoRA has no effect."""
    if args.alpha == 0:
        raise UserError("--alpha 0 trains nothing: a LoRA is multiplied by alpha / rank")


def check_tuning(args: argparse.Namespace) -> None:
    """`UserError` for invalid values of the options of `add_tuning`."""
    check_at_least(args, 1, "steps", "batch_size", "checkpoint_every")
    check_at_least(args, 0, "seed")
    check_learning_rate(args.learning_rate)


def tuning_config(args: argparse.Namespace, *, accumulate: int = 1) -> TrainingConfig:
    """Loop settings of fine-tuning a part of a model, from the options of `add_tuning`."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=accumulate,
        learning_rate=args.learning_rate,
        final_learning_rate=args.learning_rate / 20,
        warmup_steps=20,
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        log_every=10,
    )
