"""The autoencoder of a run."""

import dataclasses
from pathlib import Path

import numpy as np
from mlx.utils import tree_unflatten
from tqdm import tqdm

from mlx_snapgen.checkpoint import model as checkpoint_model
from mlx_snapgen.config import AutoencoderConfig, from_dict
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import read_object
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import from_uint8
from train.data.source import PictureSource
from train.loop.checkpoint import load_ema
from train.loop.run import recorded

DEFAULT = AutoencoderConfig()
"""The autoencoder of a run whose record has none; the run learns its latents."""
OLD_RECORD = "autoencoder.json"
"""File in which older versions recorded the autoencoder of a run."""
STATISTICS_SEED = 12345
"""Seed of the source that `load_autoencoder` measures latents on."""


def measure_latents(
    model: Autoencoder, source: PictureSource, *, count: int = 512
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of raw latents over `count` pictures."""
    means = []
    for k in tqdm(range(count // 16), desc="latents' statistics", unit="batch", leave=False):
        pictures, _ = source.batch(k, 16)
        means.append(np.array(model.encoder(from_uint8(pictures))[0]))
    flat = np.concatenate([x.reshape(-1, model.config.latent_channels) for x in means])
    return tuple(map(float, flat.mean(0))), tuple(map(float, flat.std(0)))


def load_autoencoder(folder: Path, source: PictureSource | None) -> Autoencoder:
    """The autoencoder of a model folder, or the averaged one of a run.

    If a run learned its own latents, their statistics are measured over `source`.

    Raises:
        UserError: statistics must be measured, and there is no source.
    """
    if (folder / "config.json").is_file():
        return checkpoint_model.load_autoencoder(folder)
    model = make_autoencoder(config_of(folder))
    model.update(dict(tree_unflatten(list(load_ema(folder).items()))))
    if model.config.kind != DEFAULT.kind:
        return model  # its latents are not trained, and their statistics are in its config
    if source is None:
        raise UserError(
            f"{folder} is a run of train.autoencoder: give the folder of a model with this "
            "autoencoder, such as one that train.new writes"
        )
    mean, std = measure_latents(model, source)
    model.config = dataclasses.replace(model.config, latents_mean=mean, latents_std=std)
    return model


def config_of(run: Path) -> AutoencoderConfig:
    """The config of the autoencoder that a run trains."""
    old = run / OLD_RECORD
    values = recorded(run).get("autoencoder")
    if values is None and old.is_file():
        values = read_object(old)
    return DEFAULT if values is None else from_dict(AutoencoderConfig, values)
