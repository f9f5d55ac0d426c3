"""Train the elastic supernetwork by flow matching: `python -m train.flow --run-dir DIR ...`.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2): both learn the velocity (eq. 4), the sub-network also learns from the full
one (eq. 5), and the two gradients are brought to the same norm before they are added. The text
encoder learns along. Scenes are rendered and encoded on the fly, so no picture is seen twice.

`--mask-ratio` adds EDT's masking training (arXiv 2410.23788): tokens are masked on their way into
the Middle stage, which then has to guess them from the others. EDT adds the losses of a pass with
all tokens and of a masked one; here they are those of the two halves of a batch, which weighs them
alike at half the cost, each pass having scenes of its own.
"""

import argparse
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.config import STICKERS
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.settings import parse_width
from train.evaluation.previews import previews_of
from train.loop.autoencoder import load_autoencoder
from train.loop.run import start_from
from train.loop.trainer import Trainer
from train.objectives.elastic import TextToLatents, sampled_widths
from train.objectives.flow import gradients
from train.options import add_arguments, make_data, training_config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.flow",
        description="Train the elastic stickers model. Run again with the same folder to resume.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--autoencoder", type=Path, required=True, help="folder of an autoencoder run or a model"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    parser.add_argument(
        "--mask-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="mask this share of the tokens before the Middle stage, in half of the scenes "
        "(EDT: .45; default 0)",
    )
    parser.add_argument(
        "--distillation-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="how much more a sub-network learns from the full network's velocity than from the "
        "true one, which is noisier (default 1, as in the paper)",
    )
    args = parser.parse_args()
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio}; it must be at least 0 and below 1")
    if not args.distillation_weight >= 0:
        raise UserError(
            f"--distillation-weight is {args.distillation_weight}; it must be at least 0"
        )

    mx.random.seed(args.seed)
    config = STICKERS
    tokenizers = [load_tokenizer(args.tokenizer, c) for c in config.text_encoders]
    model = TextToLatents(config, tokenizers)
    if args.init_from:
        start_from(model, args.init_from)
    model.transformer.checkpoint_blocks(args.save_memory)
    autoencoder = load_autoencoder(args.autoencoder, args.num_nouns)
    data = make_data(args, autoencoder, tokenizers)
    widths = [parse_width(name).share for name in args.widths]
    Trainer(
        model,
        gradients,
        data,
        training_config(args),
        args.run_dir,
        static=lambda step: (
            sampled_widths(widths, args.seed, step, args.sub_networks),
            args.time_shift,
            args.mask_ratio,
            args.distillation_weight,
        ),
        validate=previews_of(model, autoencoder, args.time_shift, args.widths),
    ).run()


if __name__ == "__main__":
    run_command(main)
