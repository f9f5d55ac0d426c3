"""Options of `train.evaluate`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_model, add_model_widths, finite_number, integer
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import MAX_STEPS, DrawSettings
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
    add(
        "--steps",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="denoising steps (default: the model's)",
    )
    add(
        "--guidance",
        type=finite_number,
        metavar="G",
        help="guidance scale; 1 is off (default: the model's)",
    )
    add(
        "--time-shift",
        type=finite_number,
        metavar="S",
        help="shift of the noise levels (default: the model's)",
    )
    add(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the model's few-step mode (default: on, unless --steps is more than twice the "
        "steps of this mode)",
    )
    add(
        "--attention-modulation",
        action="store_true",
        help="use the attention modulation of the EDT paper (default: off)",
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
    check_at_least(args, 1, "per_category", "validation_scenes", "batch_size", "steps")
    check_at_least(args, 0, "seed")
    first_nouns(args.num_nouns)
    if args.time_shift is not None and args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")
    if args.gallery and not args.output:
        raise UserError("--gallery needs --output, the folder for its picture")
    return args


def draw_settings(args: argparse.Namespace) -> DrawSettings:
    """Sampler settings."""
    return DrawSettings(
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        time_shift=args.time_shift,
        few_step=args.few_step,
        attention_modulation=args.attention_modulation,
        seed=args.seed,
    )
