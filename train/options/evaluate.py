"""Options of `train.evaluate`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_model, add_model_widths
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import DrawSettings
from train.data.stickers.source import add_num_nouns
from train.options.common import add_number, add_seed, check_at_least


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.evaluate",
        description="Score a stickers model: GenEval-style accuracies and flow validation loss.",
        renamed={"--widths": "--model-widths"},
    )
    add = parser.add_argument
    add_model(parser)
    add(
        "--output",
        "-o",
        type=Path,
        metavar="DIR",
        help="folder for tables and contact sheets; must not exist (default: print the table only)",
    )
    add_model_widths(parser, default=None)
    add("--lora", type=Path, metavar="FILE", help="LoRA of train.lora to score (default: none)")
    add(
        "--noun",
        metavar="NAME",
        help="score pictures of this noun alone, such as one that a LoRA was trained on; it need "
        "not be in the model's vocabulary (default: all categories)",
    )
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--guidance", type=float, metavar="G", help="guidance scale (default: the model's)")
    add("--time-shift", type=float, metavar="S", help="timestep shift (default: the model's)")
    add(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the few-step mode or not (default: for few steps, if the model has it)",
    )
    add("--attention-modulation", action="store_true", help="EDT's attention modulation")
    add_number(parser, "--per-category", 25, "prompts of each of the six categories, or of --noun")
    add_number(parser, "--validation-scenes", 128, "scenes of the validation loss")
    add_seed(parser)
    add_num_nouns(parser, "nouns of the model, the first N (default: the model's)")
    add_number(parser, "--batch-size", 16, "pictures at a time")
    add(
        "--ceilings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also score rendered scenes, directly and through the autoencoder (default: yes)",
    )
    add(
        "--gallery",
        action="store_true",
        help="draw 40 single objects with the first width, for a manual check, and score nothing",
    )
    args = parser.parse_args()
    check_at_least(args, 1, "per_category", "validation_scenes", "batch_size", "steps")
    check_at_least(args, 0, "seed")
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
