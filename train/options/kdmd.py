"""Options of `train.kdmd`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_model, add_model_widths, finite_number
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import WIDTH_NAMES
from train.data.stickers import source as stickers
from train.loop.config import TrainingConfig
from train.options.common import (
    MOST_RANK,
    add_number,
    add_output,
    add_run_dir,
    add_seed,
    check_at_least,
    check_at_most,
    check_learning_rate,
    check_new_lora,
)


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.kdmd",
        description="Distill a model to four steps. Run again with the same --run-dir\nto resume.",
        renamed={"--widths": "--model-widths"},
    )
    add_model(parser)
    add_run_dir(parser)
    add_output(parser, ".safetensors file to write, the LoRA of the student")
    add = parser.add_argument
    add(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help="LoRA of the few-step teacher (default: none, the loss is DMD alone)",
    )
    add(
        "--teacher",
        type=Path,
        metavar="MODEL",
        help="another teacher with the same latents and its own few-step mode (default: --model)",
    )
    add_model_widths(parser, default=WIDTH_NAMES)
    add_number(parser, "--steps", 2000, "iterations; each trains the critic")
    add_number(parser, "--student-every", 5, "train the student once every N iterations")
    add_number(parser, "--batch-size", 32, "prompts per iteration")
    add(
        "--guidance",
        type=finite_number,
        metavar="G",
        help="guidance scale of the teacher (default: the model's)",
    )
    add_number(parser, "--rank", 64, "rank of the LoRAs")
    add_number(parser, "--alpha", 128.0, "multiply the LoRAs by alpha / rank")
    add_number(parser, "--learning-rate", 1e-4, "AdamW learning rate")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of prompts to train on, one per line (default: captions of sticker scenes)",
    )
    add_seed(parser)
    stickers.add_options(parser)
    args = parser.parse_args()
    check_new_lora(args.output)
    check_at_least(args, 1, "steps", "student_every", "batch_size", "rank")
    check_at_least(args, 0, "seed")
    check_at_most(args, MOST_RANK, "rank")
    check_learning_rate(args.learning_rate)
    if args.teacher and args.few_step_lora:
        raise UserError("--teacher has its own few-step mode: leave out --few-step-lora")
    return args


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=50,
        betas=(0.0, 0.99),
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
    )
