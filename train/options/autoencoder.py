"""Options of `train.autoencoder`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError
from train.data.stickers import source as stickers
from train.loop.autoencoder import DEFAULT
from train.options.common import (
    add_number,
    add_run_dir,
    add_seed,
    check_at_least,
    check_learning_rate,
)


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.autoencoder",
        description="Train the autoencoder of the stickers model. Run again with the same\n"
        "--run-dir to resume.",
    )
    add = parser.add_argument
    add_run_dir(parser)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "crops per step")
    add_number(parser, "--crop", 64, "side of a crop in pixels")
    add_number(parser, "--learning-rate", 1e-3, "AdamW learning rate")
    add_number(parser, "--kl-weight", 1e-3, "weight of the KL term in the loss")
    add(
        "--init-from",
        type=Path,
        metavar="MODEL",
        help="start from the weights of this run folder or model (default: random weights)",
    )
    add(
        "--decoder-only",
        action="store_true",
        help="train the decoder alone, so that the latents do not change (default: off)",
    )
    add(
        "--encoder",
        type=Path,
        metavar="MODEL",
        help="with --decoder-only: decode the latents of this run folder or model (default: those "
        "of --init-from)",
    )
    add_seed(parser)
    stickers.add_options(parser)
    args = parser.parse_args()
    check_at_least(args, 1, "steps", "batch_size", "crop")
    check_at_least(args, 0, "seed", "kl_weight")
    check_learning_rate(args.learning_rate)
    side, unit = min(stickers.SIZE), DEFAULT.downsampling
    if args.crop > side or args.crop % unit:
        raise UserError(f"--crop must be a multiple of {unit} up to {side}, got {args.crop}")
    if args.encoder and not args.decoder_only:
        raise UserError("--encoder needs --decoder-only, since it brings the latents")
    if args.decoder_only and not args.init_from:
        raise UserError("--decoder-only needs --init-from: an encoder must be there first")
    return args
