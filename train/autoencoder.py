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
import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint import model as checkpoint_model
from mlx_snapgen.config import STICKERS, AutoencoderConfig, from_dict, to_dict
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from train import stickers
from train.engine import Trainer, TrainingConfig, load_ema


def crops(seed: int, step: int, count: int, num_nouns: int | None, size: int) -> mx.array:
    """Random crops of training scenes, (count, size, size, 3) in [-1, 1]."""
    pictures, _ = stickers.batch(seed, step * count, count, num_nouns)
    rng = np.random.default_rng((seed, step, 1))
    tops, lefts = rng.integers(0, pictures.shape[1] - size + 1, (2, count))
    rows = tops[:, None, None] + np.arange(size)[None, :, None]
    columns = lefts[:, None, None] + np.arange(size)[None, None, :]
    return to_float(pictures[np.arange(count)[:, None, None], rows, columns])


def to_float(pictures: np.ndarray) -> mx.array:
    """uint8 pictures -> float32 in [-1, 1]."""
    return mx.array(pictures).astype(mx.float32) / 127.5 - 1


CONFIG_FILE = "autoencoder.json"
"""In a run of another autoencoder than the default model's: its config."""

DECODER_NOISE = 0.1
"""Noise on the latents while the decoder trains alone, in standard deviations of a channel."""


def gradients(
    model: Autoencoder, batch: dict, key: mx.array, kl_weight: float, decoder_only: bool = False
):
    """Reconstruction and KL loss of one batch of crops.

    With `decoder_only` no gradient reaches the encoder, and its weights stay as they are.
    Normalised `latents` in the batch stand for what it says.
    """

    def loss_fn(params):
        model.update(params)
        x = batch["pictures"]
        if "latents" in batch:
            mean, log_var = model.denormalise(batch["latents"]), None
        else:
            mean, log_var = model.encoder(x)
        if decoder_only:
            mean = mx.stop_gradient(mean)
            log_var = None if log_var is None else mx.stop_gradient(log_var)
            std = DECODER_NOISE * mx.sqrt(mx.var(mean, axis=(0, 1, 2)))
        else:
            std = mx.exp(0.5 * log_var)
        latents = mean + std * mx.random.normal(mean.shape, key=key)
        y = model.decoder(latents)
        error = y - x
        edges = (
            mx.abs(error[:, 1:] - error[:, :-1]).mean()
            + mx.abs(error[:, :, 1:] - error[:, :, :-1]).mean()
        )
        reconstruction = mx.abs(error).mean()
        kl = mx.array(0.0)
        if log_var is not None:
            kl = 0.5 * (mean.square() + mx.exp(log_var) - 1 - log_var).mean()
        loss = reconstruction + 0.5 * edges + kl_weight * kl
        noise = std.mean()
        return loss, {"l1": reconstruction, "edges": edges, "kl": kl, "noise": noise}

    (_, metrics), grads = mx.value_and_grad(loss_fn)(model.trainable_parameters())
    return grads, metrics


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures."""
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) / 255**2))


def reconstruct(
    model: Autoencoder, pictures: np.ndarray, encoder: Autoencoder | None = None
) -> np.ndarray:
    """uint8 pictures (B, H, W, 3) through the autoencoder and back, 16 at a time.

    `encoder` encodes in the model's place.
    """
    out = []
    for i in range(0, len(pictures), 16):
        y = model.decode((encoder or model).encode(to_float(pictures[i : i + 16])))
        out.append(np.array(mx.round((mx.clip(y, -1, 1) + 1) * 127.5).astype(mx.uint8)))
    return np.concatenate(out)


def measure_latents(model: Autoencoder, num_nouns: int | None, count: int = 512) -> tuple:
    """Mean and standard deviation per channel of raw latents over `count` scenes."""
    pictures, _ = stickers.batch(12345, 0, count, num_nouns)
    means = [
        np.array(model.encoder(to_float(pictures[i : i + 16]))[0]) for i in range(0, count, 16)
    ]
    flat = np.concatenate(means).reshape(-1, model.config.latent_channels)
    return tuple(map(float, flat.mean(0))), tuple(map(float, flat.std(0)))


def load_autoencoder(folder: Path, num_nouns: int | None) -> Autoencoder:
    """The autoencoder of a model folder, or the averaged one of a run.

    A run's has its latents' statistics measured, over scenes of the first `num_nouns` nouns.
    """
    if (folder / "config.json").is_file():
        return checkpoint_model.load_autoencoder(folder)
    model = make_autoencoder(_config_of(folder))
    model.update(tree_unflatten(list(load_ema(folder).items())))
    if model.config.kind != STICKERS.autoencoder.kind:
        return model  # its latents are not trained here, and bring their statistics
    mean, std = measure_latents(model, num_nouns)
    model.config = dataclasses.replace(model.config, latents_mean=mean, latents_std=std)
    return model


def _config_of(run: Path) -> AutoencoderConfig:
    """What the autoencoder of a run is made of."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return STICKERS.autoencoder
    return from_dict(AutoencoderConfig, json.loads(path.read_text(encoding="utf-8")))


def keep_config(run: Path, config: AutoencoderConfig) -> None:
    """Write what the run's autoencoder is made of; `UserError`: the run is of another one."""
    path = run / CONFIG_FILE
    if path.is_file() and _config_of(run) != config:
        raise UserError(f"{run} trains another autoencoder: choose another folder")
    with whole_file(path) as partial:
        partial.write_text(json.dumps(to_dict(config), indent=1), encoding="utf-8")


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
    validation = np.stack([stickers.render(s) for s in stickers.validation_scenes(48)])

    def validate(trainer: Trainer) -> dict[str, float]:
        current = model.trainable_parameters()
        model.update(trainer.ema_parameters)
        value = psnr(validation, reconstruct(model, validation, encoder))
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
