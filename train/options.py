"""Options that several commands share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import Tokenizer
from mlx_snapgen.settings import WIDTH_NAMES
from train.data.encoded import Data
from train.data.stickers.scenes import CATEGORIES
from train.loop.config import TrainingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every trainer of a supernetwork."""
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step and process")
    parser.add_argument(
        "--noises-per-scene",
        type=int,
        default=1,
        metavar="K",
        help="micro-batches per step that show the same scenes under different noise",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=3e-4,
        help="AdamW's; Muon's matrices take 20 times that (default 3e-4, for Muon: at 1e-3 the "
        "loss rises again)",
    )
    parser.add_argument("--final-learning-rate", type=float, default=1e-5)
    parser.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="muon learns what the words mean in fewer steps, each a third dearer on a CPU",
    )
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--drop-caption", type=float, default=0.1)
    parser.add_argument(
        "--time-shift",
        type=float,
        default=4.0,
        help="towards noisy pictures, where the prompt counts (default 4)",
    )
    parser.add_argument("--num-nouns", type=int, help="train on the first N nouns only")
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=list(CATEGORIES),
        metavar="NAME",
        help="train on these kinds of scenes alone, as a first stage: " + ", ".join(CATEGORIES),
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        choices=WIDTH_NAMES,
        default=WIDTH_NAMES,
        help="widths to train; 'full' alone takes two thirds of the time of a step",
    )
    parser.add_argument(
        "--sub-networks",
        type=int,
        default=1,
        metavar="N",
        help="sub-networks per step beside the full network (default 1, as in the paper)",
    )
    parser.add_argument(
        "--save-memory",
        action="store_true",
        help="compute the blocks again for the backward pass: half the memory, a third more time",
    )
    parser.add_argument("--init-from", type=Path, help="run or model folder to start from")
    parser.add_argument("--seed", type=int, default=0)


def make_data(
    args: argparse.Namespace, autoencoder: Autoencoder, tokenizers: Sequence[Tokenizer]
) -> Data:
    """Batches as the options of `add_arguments` want them."""
    return Data(
        autoencoder,
        tokenizers,
        args.batch_size,
        args.num_nouns,
        args.seed,
        args.drop_caption,
        args.categories,
        args.noises_per_scene,
    )


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings from the options of `add_arguments`."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.noises_per_scene,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        final_learning_rate=args.final_learning_rate,
        warmup_steps=args.warmup_steps,
        ema_decay=args.ema_decay,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
