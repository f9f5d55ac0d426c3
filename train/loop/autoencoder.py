"""The autoencoder of a run."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from tqdm import tqdm

from mlx_snapgen.checkpoint import model as checkpoint_model
from mlx_snapgen.checkpoint.runs import command_of
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.files import whole_file
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.presets import FLUENT_AUTOENCODER
from mlx_snapgen.reading import read_object
from mlx_snapgen.semantics import CHANNELS, SemanticConfig
from train.data.source import PictureSource
from train.loop.assemble import check_converted
from train.loop.checkpoint import latest_checkpoint, load_ema, runs_in, trained_checkpoint
from train.loop.run import recorded

DEFAULT = AutoencoderConfig()
"""The autoencoder of a run whose record has none; the run learns its latents."""
SIZES = {config.downsampling: config for config in (DEFAULT, FLUENT_AUTOENCODER)}
"""By the side of a picture, divided by that of its latents."""
OLD_RECORD = "autoencoder.json"
"""File in which older versions recorded the autoencoder of a run."""
STATISTICS_SEED = 12345
"""Seed of the source that `load_autoencoder` measures latents on."""
STATISTICS = "latents.json"
"""File in a checkpoint with the statistics of its latents, see `keep_statistics`."""
OTHER_RUN = "{} is a run of {}: give one of train.autoencoder, or a model"
STATISTICS_FIELDS = ("latents_mean", "latents_std")
EMPTY = "decoder.table.empty"


def measure_latents(
    model: Autoencoder, source: PictureSource, *, count: int = 512
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of raw latents over `count` pictures.

    A source with fewer pictures is read once.
    """
    total, size = source.num_samples, 16
    if total is None or total >= count:
        batches = (source.batch(k, size) for k in range(count // size))
        steps = count // size
    else:
        batches = (batch for part in source.sources for batch in part.batches(size))
        steps = None
    bar = tqdm(batches, desc="latents' statistics", total=steps, unit="batch", leave=False)
    means = [np.array(model.latents(from_uint8(pictures))) for pictures, _ in bar]
    if not means:
        raise UserError("--data: none of the pictures can be read, to measure the latents on")
    flat = np.concatenate([x.reshape(-1, model.config.latent_channels) for x in means])
    return tuple(map(float, flat.mean(0))), tuple(map(float, flat.std(0)))


def load_autoencoder(folder: Path, source: PictureSource | None) -> Autoencoder:
    """The autoencoder of a model folder, or the averaged one of a run.

    If a run learned its own latents, their statistics are those of `keep_statistics`, or they are
    measured over `source`.

    Raises:
        UserError: statistics must be measured, and there is no source.
    """
    check_converted(folder)
    if (folder / "config.json").is_file():
        return checkpoint_model.load_autoencoder(folder)
    check_autoencoder_run(folder)
    model = make_autoencoder(config_of(folder))
    weights = load_ema(folder)
    if not weights.keys() <= flat_parameters(model).keys():
        raise UserError(OTHER_RUN.format(folder, "another command"))
    model.update(dict(tree_unflatten(list(weights.items()))))
    if model.config.kind != DEFAULT.kind or model.config.semantics:
        return model  # its latents are not trained, and their statistics are in its config
    found = kept_statistics(folder)
    if found is None and source is None:
        raise UserError(
            f"{folder} is a run of train.autoencoder: give the folder of a model with this "
            "autoencoder, such as one that train.new writes"
        )
    if found is None:
        assert source is not None
        found = dict(zip(STATISTICS_FIELDS, measure_latents(model, source), strict=True))
    model.config = dataclasses.replace(model.config, **found)
    return model


def with_decoder(model: Autoencoder, run: Path) -> Autoencoder:
    """The encoder of `model` with the averaged decoder of a run of train.autoencoder.

    Raises:
        UserError: the run has another encoder.
    """
    check_autoencoder_run(run)
    statistics = {name: getattr(model.config, name) for name in STATISTICS_FIELDS}
    found = make_autoencoder(dataclasses.replace(config_of(run), **statistics))
    found.update(dict(tree_unflatten(list(load_ema(run).items()))))
    # Latents are differences from what is empty.
    own, other = (
        {k: v for k, v in flat_parameters(m).items() if k.startswith(("encoder.", EMPTY))}
        for m in (model, found)
    )
    same = {name for name in own if name in other and mx.array_equal(own[name], other[name])}
    if own.keys() != same or other.keys() != same:
        raise UserError(
            f"{run} has other latents: give a run of train.autoencoder --decoder-only that "
            "began with --init-from this model"
        )
    return found


def with_other_latents(
    model: Autoencoder,
    *,
    latent_channels: int | None = None,
    semantics: SemanticConfig | None = None,
    decoder_blocks: int | None = None,
) -> Autoencoder:
    """A convolutional autoencoder of the first latents of `model` and of new ones, to train.

    It starts as `model` whose other latents are zero, which are details: the channels of
    `train.autoencoder` begin with the principal components of the pictures. Semantic latents, the
    last ones, start as random numbers, which the encoder makes of all latents of `model`.

    Args:
        latent_channels: how many are kept; None: all.
        semantics: of the latents that are added.
        decoder_blocks: residual blocks of the decoder at the latents' scale; None: as in `model`.
            The additional ones come first and start as the identity.

    Raises:
        UserError: `model` has fewer latents, more blocks or semantic latents, or is of another
            kind.
    """
    config = model.config
    if config.kind != DEFAULT.kind:
        raise UserError(f"a {config.kind} autoencoder keeps its latents and blocks")
    if config.semantics and (semantics or latent_channels):
        raise UserError("semantic latents are there already: omit --latent-channels")
    kept = latent_channels or config.latent_channels
    if kept > config.latent_channels:
        raise UserError(f"{config.latent_channels} latent channels cannot become {kept}")
    blocks = decoder_blocks or config.decoder_blocks[0]
    if blocks < (given := config.decoder_blocks[0]):
        raise UserError(f"{given} blocks at the latents' scale cannot become {blocks}")
    mean, std = config.latents_mean[:kept], config.latents_std[:kept]
    if semantics:
        semantics = dataclasses.replace(semantics, appearance_channels=config.latent_channels)
        # Those of appearance are differences from an empty place.
        mean = (0.0,) * (kept + CHANNELS)
        std = (*(std or (1.0,) * kept), *(1.0,) * CHANNELS)
    config = dataclasses.replace(
        config,
        latent_channels=kept + (CHANNELS if semantics else 0),
        semantics=semantics or config.semantics,
        decoder_blocks=(blocks, *config.decoder_blocks[1:]),
        latents_mean=mean,
        latents_std=std,
    )
    found = make_autoencoder(config)
    weights = flat_parameters(found)
    for name, value in flat_parameters(model).items():
        if name.startswith("encoder.out.") and not config.semantics:  # means, then log variances
            value = mx.concatenate([part[:kept] for part in mx.split(value, 2)])
        elif name == "decoder.inp.weight" and not config.semantics:
            value = value[..., :kept]
        elif parts := re.fullmatch(r"decoder\.blocks1\.(\d+)\.(.*)", name):
            name = f"decoder.blocks1.{int(parts[1]) + blocks - given}.{parts[2]}"
        weights[name] = value
    if semantics:
        weight, bias = _on_latents(model)
        weights |= {"encoder.semantics.inp.weight": weight, "encoder.semantics.inp.bias": bias}
    found.update(dict(tree_unflatten(list(weights.items()))))
    return found


def _on_latents(model: Autoencoder) -> tuple[mx.array, mx.array]:
    """Weight and bias of a random linear layer on the normalized latents, as one on the features.

    Its outputs have about the same variance, while a few of the features have most of theirs.
    """
    out, count = model.encoder.out, model.config.latent_channels
    width = out.weight.shape[1]
    random = mx.random.uniform(-1, 1, (width, count)) / count**0.5
    zero = model.normalize(mx.zeros(count))
    scaled = model.normalize(out.weight[:count].T) - zero
    return random @ scaled.T, random @ model.normalize(out.bias[:count])


def check_autoencoder_run(folder: Path) -> None:
    """`UserError` for a folder that is no run of train.autoencoder, as far as its record shows."""
    inside = [] if latest_checkpoint(folder) else runs_in(folder)
    if own := [run for run in inside if command_of(run) == "train.autoencoder"]:
        raise UserError(f"{folder} holds run folders: give {' or '.join(map(str, own))}")
    trained_checkpoint(folder)
    if (command := command_of(folder)) not in (None, "train.autoencoder"):
        raise UserError(OTHER_RUN.format(folder, command))


def kept_statistics(run: Path) -> dict[str, tuple[float, ...]] | None:
    """The statistics that `keep_statistics` wrote for a run's newest checkpoint, or None."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None or not (checkpoint / STATISTICS).is_file():
        return None
    values, own = read_object(checkpoint / STATISTICS), to_dict(config_of(run))
    with naming(checkpoint / STATISTICS):
        config = from_dict(AutoencoderConfig, own | {n: values.get(n) for n in STATISTICS_FIELDS})
    return {name: getattr(config, name) for name in STATISTICS_FIELDS}


def keep_statistics(run: Path, config: AutoencoderConfig) -> None:
    """Write the statistics of a run's latents into its newest checkpoint.

    All models of the checkpoint then have the same ones, also if they are made on other machines or
    after the pictures changed, so that data prepared for one is data for all.
    """
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return
    values = {name: getattr(config, name) for name in STATISTICS_FIELDS}
    # Without them, the next model measures them again.
    with contextlib.suppress(OSError), whole_file(checkpoint / STATISTICS) as partial:
        partial.write_text(json.dumps(values), encoding="utf-8")


def config_of(run: Path) -> AutoencoderConfig:
    """The config of the autoencoder that a run trains."""
    old = run / OLD_RECORD
    values = recorded(run).get("autoencoder")
    if values is None and old.is_file():
        values = read_object(old)
    with naming(run):
        return DEFAULT if values is None else from_dict(AutoencoderConfig, values)
