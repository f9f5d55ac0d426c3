"""Options of the trainers of a supernetwork: `train.flow` and `train.kd`."""

import argparse
from pathlib import Path

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.cli.options import Parser, add_model, add_model_widths, finite_number, integer
from mlx_snapgen.errors import UserError
from train.loop.config import TrainingConfig, warmup_of
from train.objectives.elastic import EARLY
from train.options.common import (
    MOST,
    REMOVED_OF_STICKERS,
    add_channel_weights,
    add_number,
    add_optimizer,
    add_removed,
    add_run_dir,
    add_seed,
    check_at_least,
    check_at_most,
    check_channel_weights,
    check_learning_rate,
    widths_of,
)
from train.options.data import add_data, check_data

WARMUP = 200
REMOVED = {
    "--autoencoder": "the autoencoder is that of --model, a folder that train.new writes",
    "--tokenizer": "the tokenizer is that of --model, a folder that train.new writes",
    "--student-config": "the sizes are those of --model, a folder that train.new writes",
    **REMOVED_OF_STICKERS,
}


def new_parser(prog: str, description: str) -> Parser:
    """A parser with the options of every trainer of a supernetwork."""
    parser = Parser(
        prog=prog,
        description=f"{description} Run again with the same --run-dir to resume.",
        renamed={"--widths": "--model-widths", "--noises-per-scene": "--noises-per-picture"},
    )
    add = parser.add_argument
    add_model(parser, default=None)
    add_run_dir(parser)
    add_data(parser)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "pictures per micro-batch in each process")
    add_number(
        parser, "--accumulate", 1, "micro-batches of different pictures per step in each process"
    )
    add_number(
        parser,
        "--noises-per-picture",
        1,
        "use the pictures of each micro-batch so many times per step, with different noise",
    )
    add_number(
        parser,
        "--learning-rate",
        3e-4,
        "AdamW learning rate; matrix parameters under Muon use 20x; above 1e-3 the loss rises",
    )
    add_number(parser, "--final-learning-rate", 1e-5, "learning rate of the last step")
    add_optimizer(parser, "muon")
    add(
        "--warmup-steps",
        type=integer(0, MOST),
        metavar="N",
        help=f"steps of linear warm-up (default: {WARMUP}, or a sixth of --steps if that is less)",
    )
    add_number(parser, "--ema-decay", 0.999, "decay of the averaged weights")
    add_number(
        parser, "--checkpoint-every", 250, "steps between checkpoints, each with a validation"
    )
    add(
        "--validation-prompts",
        nargs="+",
        metavar="PROMPT",
        help="prompts to draw after every checkpoint (default: captions of the data)",
    )
    add_number(
        parser,
        "--validation-pictures",
        64,
        "pictures kept for validation to measure the loss with after every checkpoint; 0 is off",
    )
    add_number(
        parser,
        "--drop-caption",
        0.1,
        "share of captions to leave out, which guidance needs; of several text encoders, each one "
        "also misses this share on its own",
    )
    add(
        "--time-shift",
        type=finite_number,
        metavar="N",
        help="shift of the noise levels; a higher value trains more on very noisy latents, where "
        "the prompt matters most (default: the model's)",
    )
    add_number(
        parser,
        "--early-share",
        0.0,
        f"share of the samples at noise levels of {EARLY} to 1, mostly near 1: for data whose "
        "prompts leave little open, such as stickers",
    )
    also = "; every step trains full too, but validation and previews are of these alone"
    add_model_widths(parser, default=None, more=also)
    add_channel_weights(parser)
    add_number(
        parser, "--sub-networks", 1, "sub-networks to train per step beside the full network"
    )
    add(
        "--save-memory",
        action="store_true",
        help="recompute the blocks in the backward pass: half the memory, 1/3 more time "
        "(default: off)",
    )
    add(
        "--init-from",
        type=Path,
        metavar="MODEL",
        help="start from the weights of this run folder or model (default: those of --model)",
    )
    add_seed(parser)
    add_removed(parser, REMOVED)
    return parser


def check(args: argparse.Namespace) -> ModelFolder:
    """The folder of `--model`, which sets `time_shift` by default; `UserError` if invalid."""
    at_least_1 = ("steps", "batch_size", "accumulate", "noises_per_picture", "checkpoint_every")
    check_at_least(args, 1, *at_least_1, "sub_networks")
    check_at_least(args, 0, "seed", "drop_caption", "final_learning_rate")
    check_at_least(args, 0, "ema_decay", "validation_pictures", "early_share")
    check_at_most(args, 1, "early_share", "drop_caption", "ema_decay", "final_learning_rate")
    check_channel_weights(args)
    check_learning_rate(args.learning_rate)
    if args.time_shift is not None and args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")
    folder = ModelFolder.open(args.model)
    config = folder.config
    check_data(args, unit=config.size_unit)
    most = len([width for width in widths_of(args, config) if width.share != 1.0])
    if args.sub_networks > max(1, most):
        raise UserError(f"--sub-networks {args.sub_networks}: --model-widths has only {most}")
    if args.time_shift is None:
        args.time_shift = config.sampler.time_shift
    return folder


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate * args.noises_per_picture,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        final_learning_rate=args.final_learning_rate,
        warmup_steps=(
            warmup_of(args.steps, WARMUP) if args.warmup_steps is None else args.warmup_steps
        ),
        ema_decay=args.ema_decay,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
