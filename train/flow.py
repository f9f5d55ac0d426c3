"""Train the elastic supernetwork by flow matching: `python -m train.flow --run-dir DIR ...`.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2): both learn the velocity (eq. 4), the sub-network also learns from the full
one (eq. 5), and the two gradients are scaled to the same norm before they are added. The text
encoder is trained too. Pictures are rendered and encoded during training, and none is used twice.

`--mask-ratio` adds EDT's masking training (arXiv 2410.23788): tokens are masked before the Middle
stage, which must infer them from the others. EDT adds the losses of a pass with all tokens and of a
masked pass. Here one half of a batch is masked and the other is not. The two losses have the same
weights, at half the cost, but use different pictures.
"""

from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.errors import UserError, run_command
from train.data.stickers import source as stickers
from train.data.stickers.model import STICKERS
from train.loop.autoencoder import STATISTICS_SEED, load_autoencoder
from train.loop.run import claim_data, find_folder, start_from
from train.loop.trainer import Trainer
from train.objectives.elastic import TextToLatents
from train.objectives.flow import Flow
from train.options import supernetwork as options
from train.options.common import add_number, check_at_least


def main() -> None:
    parser = options.new_parser("python -m train.flow", "Train the elastic stickers model.")
    parser.add_argument(
        "--autoencoder",
        type=Path,
        required=True,
        metavar="MODEL",
        help="autoencoder: run folder of train.autoencoder, or model folder",
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FILE", help="sentencepiece .model file"
    )
    add_number(
        parser,
        "--mask-ratio",
        0.0,
        "share of tokens to mask before the Middle stage, in half of the pictures; the EDT paper "
        "uses 0.45",
    )
    add_number(
        parser,
        "--distillation-weight",
        1.0,
        "weight of the loss between a sub-network and the full network; the loss against the "
        "data has weight 1",
    )
    args = parser.parse_args()
    options.check(args)
    check_at_least(args, 0, "distillation_weight")
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio}; it must be at least 0 and below 1")
    source = stickers.from_options(args, seed=args.seed)

    mx.random.seed(args.seed)
    tokenizers = [load_tokenizer(args.tokenizer, c) for c in STICKERS.text_encoders]
    model = TextToLatents(STICKERS, tokenizers)
    if args.init_from:
        start_from(model, find_folder(args.init_from))
    model.transformer.checkpoint_blocks(args.save_memory)
    measured = stickers.Stickers(STATISTICS_SEED, args.num_nouns)
    autoencoder = load_autoencoder(find_folder(args.autoencoder), measured)
    claim_data(args.run_dir, source.settings())
    Trainer(
        model,
        Flow(args.mask_ratio, args.distillation_weight),
        batches=options.make_batches(args, source, autoencoder, tokenizers=tokenizers),
        config=options.training_config(args),
        run_dir=args.run_dir,
        arguments=options.step_arguments(args),
        validate=options.make_previews(args, model, autoencoder),
    ).run()


if __name__ == "__main__":
    run_command(main)
