"""Train the autoencoder on rendered sticker scenes: `python -m train.autoencoder --run-dir DIR`.

It learns from random 64 px crops (most of a scene is plain background), with an L1 loss on values
and on neighbour differences (edges), and a small KL term that keeps the latents near a unit
Gaussian. Afterwards the latents' mean and standard deviation per channel are measured, so that
the transformer sees normalised latents.

`--decoder-only --init-from FOLDER` trains the decoder further under latents that stay what they
are, with noise on them, so that it forgives a transformer's small errors. The folder holds a run, a
model or an autoencoder of `convert.from_torch`, of any kind. `--encoder FOLDER` takes the latents
from another autoencoder, such as Qwen-Image's for a tiny decoder of its latents.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_snapgen.config import STICKERS
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import psnr
from train.data.crops import crops
from train.data.stickers.render import render
from train.data.stickers.scenes import validation_scenes
from train.evaluation.reconstruction import reconstruct
from train.loop.autoencoder import keep_config, load_autoencoder
from train.loop.config import TrainingConfig
from train.loop.trainer import Trainer
from train.objectives.autoencoder import gradients


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.autoencoder",
        description="Train the stickers autoencoder. Run again with the same folder to resume.",
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32, help="crops per step")
    parser.add_argument("--crop", type=int, default=64, help="side of a crop in pixels")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--num-nouns", type=int, help="train on the first N nouns only")
    parser.add_argument("--init-from", type=Path, help="run or model folder to start from")
    parser.add_argument(
        "--decoder-only", action="store_true", help="leave the encoder, and so the latents, alone"
    )
    parser.add_argument(
        "--encoder", type=Path, help="with --decoder-only: autoencoder whose latents to decode"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.encoder and not args.decoder_only:
        raise UserError("--encoder goes with --decoder-only: it brings the latents")
    if args.decoder_only and not args.init_from:
        raise UserError("--decoder-only needs --init-from: an encoder must be there first")
    mx.random.seed(args.seed)
    model = make_autoencoder(STICKERS.autoencoder)
    if args.init_from:
        start = load_autoencoder(args.init_from, args.num_nouns)
        if start.config.kind == model.config.kind:
            model.update(start.parameters())
        elif args.decoder_only:
            model = start
            keep_config(args.run_dir, model.config)
        else:
            raise UserError(f"a {start.config.kind} autoencoder is trained with --decoder-only")
    encoder = load_autoencoder(args.encoder, args.num_nouns) if args.encoder else None
    if encoder and model.config.kind == STICKERS.autoencoder.kind:
        raise UserError(
            "--encoder needs --init-from an autoencoder of public latents, such as a converted "
            "taew2_1: the default model's has latents of its own"
        )
    if encoder and encoder.config.latent_channels != model.config.latent_channels:
        raise UserError(
            f"{args.encoder} gives {encoder.config.latent_channels} latent channels, the decoder "
            f"takes {model.config.latent_channels}"
        )
    validation = np.stack([render(s) for s in validation_scenes(48)])

    def validate(trainer: Trainer) -> dict[str, float]:
        current = model.trainable_parameters()
        model.update(trainer.ema_parameters)
        value = psnr(reconstruct(model, validation, encoder), validation)
        model.update(current)
        return {"validation_psnr": value}

    config = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.0,
        warmup_steps=300,
        seed=args.seed,
    )

    def data(step: int) -> dict[str, mx.array]:
        pictures = crops(args.seed, step, args.batch_size, args.num_nouns, args.crop)
        if encoder is None:
            return {"pictures": pictures}
        return {"pictures": pictures, "latents": encoder.encode(pictures)}

    Trainer(
        model,
        gradients,
        data,
        config,
        args.run_dir,
        static=lambda step: (args.kl_weight, args.decoder_only),
        validate=validate,
    ).run()


if __name__ == "__main__":
    run_command(main)
