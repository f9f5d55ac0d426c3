"""Options of the trainers of a supernetwork: `train.flow` and `train.kd`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_model_widths
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import Tokenizer
from mlx_snapgen.settings import WIDTH_NAMES, parse_width
from train.data.encoded import EncodedBatches
from train.data.source import PictureSource
from train.data.stickers import source as stickers
from train.evaluation.previews import Previews, previews_of
from train.loop.config import TrainingConfig
from train.objectives.elastic import ElasticStep, TextToLatents, sampled_shares
from train.options.common import (
    add_drop_caption,
    add_number,
    add_run_dir,
    add_seed,
    check_at_least,
    check_at_most,
    check_learning_rate,
)


def new_parser(prog: str, description: str) -> Parser:
    """A parser with the options of every trainer of a supernetwork."""
    parser = Parser(
        prog=prog,
        description=f"{description} Run again with the same --run-dir to resume.",
        renamed={"--widths": "--model-widths", "--noises-per-scene": "--noises-per-picture"},
    )
    add = parser.add_argument
    add_run_dir(parser)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "pictures per micro-batch in each process")
    add_number(
        parser,
        "--noises-per-picture",
        1,
        "micro-batches per step; all have the same pictures, with different noise",
    )
    add_number(
        parser,
        "--learning-rate",
        3e-4,
        "AdamW learning rate; matrix parameters under Muon use 20x; above 1e-3 the loss rises",
    )
    add_number(parser, "--final-learning-rate", 1e-5, "learning rate of the last step")
    add(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="optimizer; muon needs fewer steps, but on a CPU each step takes 1/3 longer "
        "(default: %(default)s)",
    )
    add_number(parser, "--warmup-steps", 200, "steps of linear warm-up")
    add_number(parser, "--ema-decay", 0.999, "decay of the averaged weights")
    add_number(parser, "--checkpoint-every", 250, "steps between checkpoints")
    add_drop_caption(parser)
    add_number(
        parser,
        "--time-shift",
        4.0,
        "shift of the noise levels; a higher value trains more on very noisy latents, where "
        "the prompt matters most",
    )
    add_model_widths(parser, default=WIDTH_NAMES)
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
        help="start from the weights of this run folder or model (default: random weights)",
    )
    add_seed(parser)
    stickers.add_options(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """`UserError` for invalid values."""
    at_least_1 = ("steps", "batch_size", "noises_per_picture", "checkpoint_every", "sub_networks")
    check_at_least(args, 1, *at_least_1)
    check_at_least(args, 0, "seed", "drop_caption", "warmup_steps", "final_learning_rate")
    check_at_least(args, 0, "ema_decay")
    check_at_most(args, 1, "drop_caption", "ema_decay")
    check_learning_rate(args.learning_rate)
    if args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")


def shares_of(args: argparse.Namespace) -> list[float]:
    """The shares of the widths to train."""
    return [parse_width(name).share for name in args.model_widths]


def make_batches(
    args: argparse.Namespace,
    source: PictureSource,
    autoencoder: Autoencoder,
    *,
    tokenizers: Sequence[Tokenizer],
) -> EncodedBatches:
    """Batches of a source."""
    return EncodedBatches(
        source,
        autoencoder,
        tokenizers,
        batch_size=args.batch_size,
        seed=args.seed,
        drop_caption=args.drop_caption,
        noises_per_picture=args.noises_per_picture,
    )


def step_arguments(args: argparse.Namespace) -> Callable[[int], ElasticStep]:
    """Step -> the arguments of an elastic objective."""
    shares = shares_of(args)

    def arguments(step: int) -> ElasticStep:
        sampled = sampled_shares(shares, seed=args.seed, step=step, count=args.sub_networks)
        return ElasticStep(sampled, args.time_shift)

    return arguments


def make_previews(
    args: argparse.Namespace, model: TextToLatents, autoencoder: Autoencoder
) -> Previews:
    """Pictures of sticker prompts after every checkpoint."""
    return previews_of(
        model,
        autoencoder,
        stickers.PREVIEW_PROMPTS,
        size=stickers.SIZE,
        time_shift=args.time_shift,
        widths=args.model_widths,
    )


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.noises_per_picture,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        final_learning_rate=args.final_learning_rate,
        warmup_steps=args.warmup_steps,
        ema_decay=args.ema_decay,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
