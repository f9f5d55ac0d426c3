"""The autoencoder of a run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint import model as checkpoint_model
from mlx_snapgen.config import STICKERS, AutoencoderConfig, from_dict, to_dict
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import from_uint8
from train.data.stickers.render import batch
from train.loop.checkpoint import load_ema

CONFIG_FILE = "autoencoder.json"
"""In a run of another autoencoder than the default model's: its config."""


def measure_latents(model: Autoencoder, num_nouns: int | None, count: int = 512) -> tuple:
    """Mean and standard deviation per channel of raw latents over `count` scenes."""
    pictures, _ = batch(12345, 0, count, num_nouns)
    means = [
        np.array(model.encoder(from_uint8(pictures[i : i + 16]))[0]) for i in range(0, count, 16)
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
