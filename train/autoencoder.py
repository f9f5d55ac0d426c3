"""Train the autoencoder on rendered sticker scenes: `python -m train.autoencoder --run-dir DIR`.

It learns from random 64 px crops (most of a scene is plain background), with an L1 loss on values
and on neighbor differences (edges), and a small KL term that keeps the latents near a unit
Gaussian. `train.flow` measures the latents' mean and standard deviation per channel, so that the
transformer sees normalized latents.

`--decoder-only --init-from MODEL` trains the decoder further, with noise on latents that do not
change: it becomes robust to small errors of a transformer. MODEL is a run, a model or an
autoencoder of `convert.from_torch`, of any kind. `--encoder MODEL` takes the latents of another
autoencoder, such as Qwen-Image's for a tiny decoder of its latents.
"""

from pathlib import Path

import mlx.core as mx

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.config import to_dict
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import psnr
from train.data.crops import crops
from train.data.source import Batch
from train.data.stickers import source as stickers
from train.evaluation.reconstruction import reconstruct
from train.loop.autoencoder import DEFAULT, STATISTICS_SEED, config_of, load_autoencoder
from train.loop.config import TrainingConfig
from train.loop.run import claim, find_folder
from train.loop.trainer import Trainer
from train.objectives.autoencoder import Reconstruction
from train.options.common import add_number, add_run_dir, add_seed, check_at_least

VALIDATION_PICTURES = 48


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train.autoencoder",
        description="Train the stickers autoencoder. Run again with the same folder to resume.",
    )
    add = parser.add_argument
    add_run_dir(parser)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "crops per step")
    add_number(parser, "--crop", 64, "side of a crop in pixels")
    add_number(parser, "--learning-rate", 1e-3, "AdamW learning rate")
    add_number(parser, "--kl-weight", 1e-3, "weight of the KL term")
    add(
        "--init-from",
        type=Path,
        metavar="MODEL",
        help="run or model to start from (default: random weights)",
    )
    add("--decoder-only", action="store_true", help="do not train the encoder: the latents stay")
    add(
        "--encoder",
        type=Path,
        metavar="MODEL",
        help="with --decoder-only: run or model whose latents to decode (default: the model's own)",
    )
    add_seed(parser)
    stickers.add_options(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    check_at_least(args, 1, "steps", "batch_size", "crop")
    if args.encoder and not args.decoder_only:
        raise UserError("--encoder needs --decoder-only, since it brings the latents")
    if args.decoder_only and not args.init_from:
        raise UserError("--decoder-only needs --init-from: an encoder must be there first")
    source = stickers.from_options(args, seed=args.seed)
    measured = stickers.Stickers(STATISTICS_SEED, args.num_nouns)
    mx.random.seed(args.seed)
    model = make_autoencoder(DEFAULT)
    if args.init_from:
        start = load_autoencoder(find_folder(args.init_from), measured)
        if start.config.kind == model.config.kind:
            model.update(start.parameters())
        elif args.decoder_only:
            model = start
        else:
            raise UserError(f"a {start.config.kind} autoencoder is trained with --decoder-only")
    encoder = load_autoencoder(find_folder(args.encoder), measured) if args.encoder else None
    if encoder and model.config.kind == DEFAULT.kind:
        raise UserError(
            "--encoder needs --init-from an autoencoder of public latents, such as a converted "
            "taew2_1: the default model's has latents of its own"
        )
    if encoder and encoder.config.latent_channels != model.config.latent_channels:
        raise UserError(
            f"{args.encoder} has {encoder.config.latent_channels} latent channels, the decoder "
            f"takes {model.config.latent_channels}"
        )
    claim(
        args.run_dir,
        source.settings() | {"autoencoder": to_dict(model.config)},
        may_change=("num_nouns", "categories"),
        unrecorded={"data": "stickers", "autoencoder": to_dict(config_of(args.run_dir))},
    )
    validation, _ = stickers.ValidationStickers().batch(0, VALIDATION_PICTURES)

    def validate(trainer: Trainer) -> dict[str, float]:
        with trainer.averaged():
            return {"validation_psnr": psnr(reconstruct(model, validation, encoder), validation)}

    def batches(number: int) -> Batch:
        pictures = crops(source, number, count=args.batch_size, size=args.crop, seed=args.seed)
        if encoder is None:
            return {"pictures": pictures}
        return {"pictures": pictures, "latents": encoder.encode(pictures)}

    Trainer(
        model,
        Reconstruction(args.kl_weight, args.decoder_only),
        batches=batches,
        config=TrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=0.0,
            warmup_steps=300,
            seed=args.seed,
        ),
        run_dir=args.run_dir,
        validate=validate,
    ).run()


if __name__ == "__main__":
    run_command(main)
