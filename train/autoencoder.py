"""Train the autoencoder on rendered sticker scenes: `python -m train.autoencoder --run-dir DIR`.

Training uses random 64 px crops (most of a scene is plain background), an L1 loss on values and on
neighbor differences (edges), and a small KL term that keeps the latents near a unit Gaussian.
`train.flow` measures the mean and standard deviation of the latents per channel, to normalize the
latents for the transformer.

`--decoder-only --init-from MODEL` trains the decoder of MODEL further, on noisy latents of its
frozen encoder, which makes the decoder robust to small errors of a transformer. MODEL is a run, a
model or an autoencoder of `convert.from_torch`, of any kind. `--encoder MODEL` encodes with another
autoencoder, for example with Qwen-Image's to train a tiny decoder of its latents.
"""

import mlx.core as mx

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
from train.options.autoencoder import parse

VALIDATION_PICTURES = 48


def main() -> None:
    args = parse()
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
