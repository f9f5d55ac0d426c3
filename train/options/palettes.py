"""Options of `train.palettes`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_model, add_model_widths, finite_number
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_new, expanded
from train.loop.run import check_run_folder
from train.options.common import (
    add_number,
    add_output,
    add_run_dir,
    add_tuning,
    check_at_least,
    check_tuning,
)

TUNING = {"steps": 1000, "batch_size": 16, "checkpoint_every": 250, "learning_rate": 1e-3}
HELD_OUT = 16  # prompts that are not used for training


def parse(description: str | None) -> argparse.Namespace:
    """The command's options, checked; `run_dir` has its default."""
    parser = Parser(
        prog="python -m train.palettes",
        description=description,
        epilog="Run again with the same options to resume.",
        renamed={
            "--widths": "--model-widths",
            "--bits": "--quantize",
            "--prompts": "--prompts-file",
        },
    )
    add = parser.add_argument
    add_model(parser)
    add_output(parser, "model folder to write")
    add(
        "--quantize",
        type=finite_number,
        default=4.3,
        metavar="BITS",
        help="average bits per weight of the transformer, 4 to 8 (default: %(default)s)",
    )
    add_model_widths(parser, default=["full"])
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of prompts to draw and train on, one per line (default: captions from the "
        "vocabulary of the built-in model; required for other models)",
    )
    add_number(parser, "--pictures", 128, "number of pictures to draw and train on")
    add_run_dir(parser, default="runs/OUTPUT")
    add_tuning(parser, TUNING)
    add_number(
        parser,
        "--score",
        0,
        "add a GenEval-style score over N prompts of each category to the table; 0 is off",
    )
    add(
        "--score-with",
        type=Path,
        metavar="FOLDER",
        help="folder with the pictures of Fluent Emoji, which --score needs for a model of them "
        "(default: none)",
    )
    args = parser.parse_args()
    args.output = expanded(args.output)
    args.run_dir = expanded(args.run_dir or Path("runs") / args.output.name)
    check_run_folder(args.run_dir, "train.palettes")
    check_tuning(args)
    check_at_least(args, 0, "score")
    if not 4 <= args.quantize <= 8:
        raise UserError(f"--quantize takes 4 to 8 bits on average, not {args.quantize:g}")
    if args.pictures <= HELD_OUT:
        raise UserError(f"--pictures must be above {HELD_OUT}, which are not trained on")
    if len(set(args.model_widths)) < len(args.model_widths):
        raise UserError(f"a width is named twice: {' '.join(args.model_widths)}")
    check_new(args.output)
    return args
