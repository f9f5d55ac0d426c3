"""Options of `train.autoencoder`."""

import argparse
from pathlib import Path

from mlx_snapgen.cli.options import Parser, integer
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import BYTES_PER_PIXEL, check_pixels
from train.data.open import is_prepared
from train.loop.autoencoder import DEFAULT, SIZES
from train.options.common import (
    REMOVED_OF_STICKERS,
    add_number,
    add_optimizer,
    add_removed,
    add_run_dir,
    add_seed,
    check_at_least,
    check_learning_rate,
)
from train.options.data import add_data, check_data

RESOLUTION = 256
"""Of the pictures by default."""
UNIT = 32
"""Sides of pictures are multiples of this, so that every autoencoder can encode them."""


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.autoencoder",
        description="Train an autoencoder on pictures. Run again with the same --run-dir to\n"
        "resume.",
    )
    add = parser.add_argument
    add_run_dir(parser)
    add_data(parser, resolution=str(RESOLUTION), prepared=False)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "crops per micro-batch in each process")
    add_number(parser, "--accumulate", 1, "micro-batches per step in each process")
    add_number(
        parser,
        "--crop",
        64,
        "side of a crop in pixels, or the shorter side of a picture if that is less; "
        "--semantic-latents takes whole pictures",
    )
    add_number(
        parser, "--learning-rate", 1e-3, "AdamW learning rate; Muon, for the blocks, uses 20x"
    )
    add_optimizer(parser, "adamw")
    add_number(parser, "--kl-weight", 1e-3, "weight of the KL term in the loss")
    add_number(
        parser, "--checkpoint-every", 500, "steps between checkpoints, each with a validation"
    )
    add(
        "--factor",
        type=int,
        choices=list(SIZES),
        help="side of a picture, divided by the side of its latents (default: "
        f"{DEFAULT.downsampling})",
    )
    latents = " or ".join(f"{c.latent_channels} for factor {f}" for f, c in SIZES.items())
    for name, what in (
        (
            "latent-channels",
            f"channels of the latents (default: {latents}; with --init-from those of MODEL, of "
            "which the first can be kept)",
        ),
        (
            "channels",
            "channels at 1/4 of the side of a picture, the others in proportion (default: "
            f"{DEFAULT.encoder_channels[0]})",
        ),
    ):
        add(f"--{name}", type=integer(2, 2**12), metavar="N", help=what)
    add(
        "--decoder-blocks",
        type=integer(1, 64),
        metavar="N",
        help="residual blocks of the decoder at the latents' scale (default: "
        f"{DEFAULT.decoder_blocks[0]}, with --init-from those of MODEL)",
    )
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
        "--semantic-latents",
        action="store_true",
        help="add 28 latent channels, codes of noun, color, background and the thing's square, "
        "or train those of MODEL, on whole pictures; the encoder's other latents do not "
        "change; with --decoder-only the decoder learns alone from the codes of the scenes; needs "
        "--data stickers:pictures=FOLDER of at most 240 nouns (default: off)",
    )
    add(
        "--encoder",
        type=Path,
        metavar="MODEL",
        help="with --decoder-only: decode the latents of this run folder or model (default: those "
        "of --init-from)",
    )
    add_seed(parser)
    add_removed(parser, REMOVED_OF_STICKERS)
    args = parser.parse_args()
    check_at_least(args, 1, "steps", "batch_size", "accumulate", "checkpoint_every", "crop")
    check_at_least(args, 0, "seed", "kl_weight")
    check_learning_rate(args.learning_rate)
    factor = args.factor or DEFAULT.downsampling
    if args.crop % factor:
        raise UserError(f"--crop must be a multiple of {factor}, got {args.crop}")
    if args.init_from and (args.channels or args.factor):
        raise UserError("--init-from has its own sizes: omit --channels and --factor")
    frozen = args.decoder_only or args.semantic_latents
    if args.init_from and (args.latent_channels or args.decoder_blocks) and not frozen:
        raise UserError(
            "--init-from with other latents or blocks needs --decoder-only or --semantic-latents"
        )
    check_data(args, unit=UNIT, bytes_per_pixel=3 * args.batch_size)
    check_pixels(args.crop, args.crop, BYTES_PER_PIXEL * args.batch_size)
    for spec in args.data:
        if is_prepared(spec):
            raise UserError(f"--data: {spec} holds latents; give the pictures themselves")
    if args.encoder and not args.decoder_only:
        raise UserError("--encoder needs --decoder-only, since it brings the latents")
    if frozen and not args.init_from:
        option = "--decoder-only" if args.decoder_only else "--semantic-latents"
        raise UserError(f"{option} needs --init-from: an encoder must be there first")
    return args
