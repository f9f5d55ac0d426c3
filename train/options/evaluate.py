"""Options of `train.evaluate`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import (
    Parser,
    add_model,
    add_model_source,
    add_model_widths,
    add_sampling,
    finite_number,
    integer,
    option_of,
)
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_new, check_writable, expanded
from train.data.open import is_stickers
from train.data.stickers.source import add_num_nouns
from train.options.common import MOST, add_number, add_seed, check_at_least, check_outside
from train.options.data import MOST_SIDE, add_data, filter_from

LISTS = ("geneval", "dpg")
STICKERS_ALONE = ("noun", "gallery")
UNFINISHED = ".unfinished"
"""File in an output while it is not complete."""


def parse() -> argparse.Namespace:
    """The command's options, checked; `prompts` are those of --prompts-file, or None."""
    parser = Parser(
        prog="python -m train.evaluate",
        description="Measure a model on captioned pictures: validation loss, CLIP score and CMMD.\n"
        "Or draw the prompts of GenEval or DPG-Bench for their own scorers.\n"
        "Without --data, or with --data stickers: score a model of sticker pictures. The command\n"
        "draws prompts and detects the objects in the pictures (as GenEval does).",
        renamed={"--widths": "--model-widths"},
    )
    add = parser.add_argument
    add_model(parser)
    add_model_source(parser, quantize="4 or 8 bits per weight of a public model, or none")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="folder for tables and sheets; must not exist, or be that of the interrupted command, "
        "which --geneval and --dpg resume (default: none, print a table)",
    )
    add_model_widths(parser, default=None)
    add("--lora", type=Path, metavar="FILE", help="merge this LoRA of train.lora (default: none)")
    add_sampling(parser)
    add(
        "--time-shift",
        type=finite_number,
        metavar="S",
        help="shift of the noise levels (default: the model's)",
    )
    for side in ("height", "width"):
        add(
            f"--{side}",
            type=integer(1, MOST_SIDE),
            metavar="PX",
            help=f"{side} of the pictures of --prompts-file, --geneval and --dpg in pixels "
            "(default: the model's)",
        )
    add_seed(parser)
    add(
        "--batch-size",
        type=integer(1, MOST),
        metavar="N",
        help="pictures per batch (default: 16, or as many as half of the memory holds; of a public "
        "model 1)",
    )
    _add_measures(parser)
    add_data(parser, required=False)
    _add_lists(parser)
    _add_stickers(parser)
    args = parser.parse_args()
    args.output = args.output and expanded(args.output)
    args.is_stickers = not args.data or all(map(is_stickers, args.data))
    _check(args)
    args.prompts = list(read_prompts(args.prompts_file)) if args.prompts_file else None
    return args


def _add_measures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measures on --data")
    group.add_argument(
        "--clip",
        metavar="CLIP",
        help="CLIP for CLIP score and CMMD: folder or Hugging Face repository such as "
        "openai/clip-vit-large-patch14, or a folder of convert.from_torch --kind clip-score "
        "(default: none, measure the validation loss alone)",
    )
    add_number(
        group,
        "--pictures",
        256,
        "pictures of the validation part to measure on, at most; a picture is drawn for each of "
        "their captions",
    )
    group.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="prompts of the sheet, one per line (default: the first captions of the validation "
        "part)",
    )


def _add_lists(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts of GenEval and DPG-Bench, drawn into --output")
    add = group.add_argument
    add(
        "--geneval",
        type=Path,
        metavar="FILE",
        help="draw the prompts of GenEval's evaluation_metadata.jsonl (default: off)",
    )
    add(
        "--dpg",
        type=Path,
        metavar="FOLDER",
        help="draw DPG-Bench's folder of prompts, four pictures of each (default: off)",
    )
    add_number(group, "--per-prompt", 4, "pictures of each prompt of --geneval")


def _add_stickers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores of stickers")
    add = group.add_argument
    add(
        "--noun",
        metavar="NAME",
        help="score only pictures of this noun, for example the noun of a LoRA (default: all "
        "categories)",
    )
    add_number(group, "--per-category", 25, "prompts of each of the six categories, or of --noun")
    add_number(group, "--validation-scenes", 128, "number of scenes for the validation loss")
    add_num_nouns(group, "use only the first N nouns in prompts (default: the nouns of the model)")
    add(
        "--ceilings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also score rendered scenes, directly and through the autoencoder (default: on)",
    )
    add(
        "--gallery",
        action="store_true",
        help="draw 40 single objects with the first width for a manual check, without scores "
        "(default: off)",
    )


def _check(args: argparse.Namespace) -> None:
    check_at_least(args, 1, "per_category", "validation_scenes", "batch_size", "pictures")
    check_at_least(args, 1, "per_prompt")
    check_at_least(args, 0, "seed")
    filter_from(args)
    if args.time_shift is not None and args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")
    if args.gallery and not args.output:
        raise UserError("--gallery needs --output, the folder for its picture")
    lists = [name for name in LISTS if getattr(args, name) is not None]
    modes = [f"--{name}" for name in lists]
    modes += ["--data"] * bool(args.data)
    modes += [f"--{name}" for name in STICKERS_ALONE if getattr(args, name)]
    if len(modes) > 1 and (lists or not args.is_stickers):
        raise UserError(f"{modes[0]} and {modes[1]} are two commands: give one of them")
    if args.prompts_file and not (args.output or args.is_stickers):
        raise UserError("--prompts-file needs --output, the folder for the sheet of its pictures")
    if args.output:
        check_outside("--output", args.output, sources=args.data or ())
    if lists:
        if args.output is None:
            raise UserError(f"{modes[0]} needs --output, the folder for its pictures")
        if len(args.model_widths or ()) > 1:
            raise UserError(f"{modes[0]} draws with one width: give one of --model-widths")
        check_writable(args.output)
    elif args.output and not (args.output / UNFINISHED).exists():
        check_new(args.output)
    sides = [name for name in ("height", "width") if getattr(args, name) is not None]
    if sides and not (lists or args.is_stickers or args.prompts_file):
        raise UserError(
            f"{option_of(sides[0])} takes --prompts-file, --geneval or --dpg: pictures of --data "
            "have their own sizes, see --resolution"
        )
    if args.is_stickers:
        needs_data = [name for name in ("clip", "prompts_file") if getattr(args, name) is not None]
        if needs_data:
            raise UserError(f"{option_of(needs_data[0])} takes --data with pictures")
