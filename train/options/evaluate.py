"""Options of `train.evaluate`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import (
    Parser,
    add_model,
    add_model_widths,
    add_sampling,
    finite_number,
)
from mlx_snapgen.errors import UserError
from train.data.stickers.source import add_num_nouns
from train.data.stickers.vocabulary import first_nouns
from train.options.common import add_number, add_seed, check_at_least


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.evaluate",
        description="Score a model of sticker pictures: draw prompts, detect the objects in the\n"
        "pictures (as GenEval does), and measure the validation loss.",
        renamed={"--widths": "--model-widths"},
    )
    add = parser.add_argument
    add_model(parser)
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="folder for tables and contact sheets; must not exist (default: none, print a table)",
    )
    add_model_widths(parser, default=None)
    add("--lora", type=Path, metavar="FILE", help="merge this LoRA of train.lora (default: none)")
    add(
        "--noun",
        metavar="NAME",
        help="score only pictures of this noun, for example the noun of a LoRA (default: all "
        "categories)",
    )
    add_sampling(parser)
    add(
        "--time-shift",
        type=finite_number,
        metavar="S",
        help="shift of the noise levels (default: the model's)",
    )
    add_number(parser, "--per-category", 25, "prompts of each of the six categories, or of --noun")
    add_number(parser, "--validation-scenes", 128, "number of scenes for the validation loss")
    add_seed(parser)
    add_num_nouns(parser, "use only the first N nouns in prompts (default: the nouns of the model)")
    add_number(parser, "--batch-size", 16, "pictures per batch")
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
    args = parser.parse_args()
    check_at_least(args, 1, "per_category", "validation_scenes", "batch_size")
    check_at_least(args, 0, "seed")
    first_nouns(args.num_nouns)
    if args.time_shift is not None and args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")
    if args.gallery and not args.output:
        raise UserError("--gallery needs --output, the folder for its picture")
    return args
