"""Train an autoencoder on pictures: `python -m train.autoencoder --data SOURCE --run-dir DIR`.

Training uses random crops of 64 px, an L1 loss on values and on neighbor differences (edges), and a
small KL term that keeps the latents near a unit Gaussian. It starts from the principal components
of the pictures. `train.new` measures the mean and the
standard deviation of the latents per channel, to normalize the latents for the transformer.

`--decoder-only --init-from MODEL` trains the decoder of MODEL further, on noisy latents of its
frozen encoder, which makes the decoder robust to small errors of a transformer. MODEL is a run, a
model or an autoencoder of `convert.from_torch`, of any kind. `--encoder MODEL` encodes with another
autoencoder, for example with Qwen-Image's to train a tiny decoder of its latents.

With `--latent-channels` the decoder learns to draw the pictures from the first of MODEL's latents,
and with `--decoder-blocks` it gets more blocks for it. Where the pictures show the same things
again and again, it then knows their details, and a transformer needs to learn only the rest. Crops
must be large enough to tell what they show: `--crop 128`.

`--semantic-latents --init-from MODEL` adds latents with codes of noun, color and background, and
of the thing's square. A transformer learns them earliest. The decoder gets a table of how the
known things look, and a part of the encoder learns the new latents from the layouts of the scenes,
which only stickers have. The other latents, whose number --latent-channels sets, tell what is not
known. With `--decoder-only` the decoder learns alone; `train.export --decoder` puts it into a
model. It takes whole pictures instead of crops.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.cli.notices import announce
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import contact_sheet, from_uint8, psnr
from mlx_snapgen.semantics import SEEN_CHANNELS, SemanticConfig
from train.data.crops import crops
from train.data.encoded import check_channels
from train.data.mixture import Mixture, Prefetched
from train.data.source import MAY_CHANGE, Batch, Source
from train.data.stickers.known_things import semantic_source, semantics_of, start_known_things
from train.data.stickers.semantics import loss_weights, right_share
from train.data.stickers.source import Stickers
from train.evaluation.reconstruction import reconstruct
from train.loop.autoencoder import (
    DEFAULT,
    SIZES,
    STATISTICS_SEED,
    config_of,
    load_autoencoder,
    with_other_latents,
)
from train.loop.checkpoint import latest_checkpoint
from train.loop.config import TrainingConfig, warmup_of
from train.loop.principal_components import start_from_components
from train.loop.run import claim, find_folder, recorded
from train.loop.trainer import Trainer
from train.objectives.autoencoder import Reconstruction
from train.options.autoencoder import RESOLUTION, UNIT, parse
from train.setup.data import data_from

VALIDATION_PICTURES = 48
SHOWN = 8
"""Of these, on the sheet after a checkpoint."""
START_CROP = 64
"""Side in pixels of the crops whose principal components are the start."""
SEMANTIC, DECODER = "semantic_latents", "decoder_only"
"""Settings of runs: what they train."""
PICTURES_ONLY = "pictures_only"
"""Setting of runs that also use pictures without a caption."""


def side(args: argparse.Namespace) -> int:
    """Side of a square picture in pixels."""
    return args.resolution or RESOLUTION


def open_source(args: argparse.Namespace, *, seed: int, run_dir: Path) -> Any:
    """The pictures of the options."""
    with announce("reading the data ..."):
        size = (side(args), side(args))
        return data_from(
            args,
            size=size,
            unit=UNIT,
            seed=seed,
            run_dir=run_dir,
            pictures_only=needs_no_captions(run_dir),
        )


def needs_no_captions(run_dir: Path) -> bool:
    """Whether a run uses pictures without a caption: all but those of earlier versions."""
    found = PICTURES_ONLY in recorded(run_dir) or latest_checkpoint(run_dir) is None
    group = mx.distributed.init()
    # Only the first process has the folder of the run.
    flag = mx.array(float(found and group.rank() == 0))
    return bool(mx.distributed.all_sum(flag, group=group).item())


def first_crops(source: Any, args: argparse.Namespace) -> mx.array:
    """512 crops of the first pictures, of at most `START_CROP` pixels per side."""
    size = min(args.crop, START_CROP)
    found = [crops(source, k, count=16, size=size, seed=args.seed) for k in range(32)]
    # Batches may have pictures of different shapes.
    size = min(batch.shape[1] for batch in found)
    return mx.concatenate([batch[:, :size, :size] for batch in found])


def sizes(
    latent_channels: int | None,
    channels: int | None,
    *,
    factor: int | None = None,
    first_blocks: int | None = None,
    picture_channels: int = 3,
) -> AutoencoderConfig:
    """The autoencoder of a factor with other channels; `channels` at 1/4 of a picture's side.

    `first_blocks` are the decoder's at the latents' scale.
    """
    config = SIZES[factor or DEFAULT.downsampling]
    first = config.encoder_channels[0]

    def scaled(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(width * (channels or first) // first for width in widths)

    return dataclasses.replace(
        config,
        latent_channels=latent_channels or config.latent_channels,
        encoder_channels=scaled(config.encoder_channels),
        decoder_channels=scaled(config.decoder_channels),
        decoder_blocks=(first_blocks or config.decoder_blocks[0], *config.decoder_blocks[1:]),
        picture_channels=picture_channels,
    )


def open_models(
    args: argparse.Namespace,
    start: Path | None,
    latents: Path | None,
    *,
    picture_channels: int,
    stickers: Stickers | None = None,
) -> tuple[Autoencoder, Autoencoder | None]:
    """The autoencoder to train, and that of --encoder; `UserError` if they do not fit.

    Args:
        start, latents: folders of --init-from and --encoder.
        stickers: those of --semantic-latents.
    """
    measured = None
    if start or latents:
        measured = open_source(args, seed=STATISTICS_SEED, run_dir=args.run_dir)
    if start:
        model = load_autoencoder(start, measured)
        check_channels(model.config, picture_channels)
        if args.crop % (factor := model.config.downsampling):
            raise UserError(f"--crop must be a multiple of {factor} for {start}, got {args.crop}")
        given, new = model.config.semantics, None
        if given and not stickers:
            raise UserError(
                f"{start} has semantic latents, which are learned from the scenes of Fluent Emoji: "
                "give --semantic-latents and --data stickers:pictures=FOLDER"
            )
        if model.config.kind != DEFAULT.kind and not args.decoder_only:
            raise UserError(f"a {model.config.kind} autoencoder is trained with --decoder-only")
        if stickers:
            new = new_semantics(args, start, model, stickers)
        if new or args.latent_channels or args.decoder_blocks:
            model = with_other_latents(
                model,
                latent_channels=args.latent_channels,
                semantics=new,
                decoder_blocks=args.decoder_blocks,
            )
        if new and stickers and latest_checkpoint(args.run_dir) is None:
            start_known_things(model, stickers)
        if model.config.kind == DEFAULT.kind and not model.config.semantics:
            model.config = dataclasses.replace(model.config, latents_mean=(), latents_std=())
    else:
        model = make_autoencoder(
            sizes(
                args.latent_channels,
                args.channels,
                factor=args.factor,
                first_blocks=args.decoder_blocks,
                picture_channels=picture_channels,
            )
        )
    encoder = load_autoencoder(latents, measured) if latents else None
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
    return model, encoder


def new_semantics(
    args: argparse.Namespace, start: Path, model: Autoencoder, stickers: Stickers
) -> SemanticConfig | None:
    """The semantic latents to add to `model`; None if it has them.

    Raises:
        UserError: it cannot have them, or has others.
    """
    if model.config.kind != DEFAULT.kind:
        raise UserError(f"a {model.config.kind} autoencoder has no semantic latents")
    new, given = semantics_of(stickers, model.config.downsampling), model.config.semantics
    if given is None and args.decoder_only:
        raise UserError(f"{start} has no semantic latents yet: omit --decoder-only")
    if given is not None and (given.things, given.sides) != (new.things, new.sides):
        raise UserError(
            f"{start} knows {given.things} things in {len(given.sides)} sizes: give --data "
            f"stickers:pictures=FOLDER,nouns={given.things}"
        )
    return None if given else new


def claim_run(args: argparse.Namespace, source: Source, model: Autoencoder) -> None:
    """Record the run of an autoencoder."""
    settings = source.settings()
    if needs_no_captions(args.run_dir):
        settings[PICTURES_ONLY] = True
    described = to_dict(model.config)
    if config_of(args.run_dir) == model.config:
        # The same, also if it was recorded with fewer fields.
        described = recorded(args.run_dir).get("autoencoder", described)
    settings |= {"autoencoder": described, "specs": args.data, "resolution": side(args)}
    claim(
        args.run_dir,
        settings | {SEMANTIC: args.semantic_latents, DECODER: args.decoder_only},
        steps=args.steps,
        may_change=(*MAY_CHANGE, "specs", "resolution"),
        newer=(SEMANTIC, DECODER),
        unrecorded={"data": "stickers", "autoencoder": described},
    )


def main() -> int:
    args = parse()
    start = args.init_from and find_folder(args.init_from)
    latents = args.encoder and find_folder(args.encoder)
    source: Any = open_source(args, seed=args.seed, run_dir=args.run_dir)
    stickers = None
    if args.semantic_latents:
        stickers = semantic_source(source)
        parts = [dataclasses.replace(part, strangers=True) for part in source.sources]
        source = Mixture(parts, source.weights, seed=args.seed) if len(parts) > 1 else parts[0]
    mx.random.seed(args.seed)
    model, encoder = open_models(
        args, start, latents, picture_channels=source.channels, stickers=stickers
    )
    claim_run(args, source, model)
    held_out = source.validation()
    validation, _ = (held_out or source).batch(0, VALIDATION_PICTURES)
    metric = "validation_psnr" if held_out else "psnr"

    true = None
    if args.semantic_latents:
        true = held_out.semantics(0, VALIDATION_PICTURES, factor=model.config.downsampling)

    def validate(trainer: Trainer) -> dict[str, float]:
        with trainer.averaged():
            decoded = reconstruct(model, validation, encoder)
            if true is not None:
                each = [np.array(model.encoder(from_uint8(x[None]))[0]) for x in validation]
                read = np.concatenate(each)
        rows = [*validation[:SHOWN], *decoded[:SHOWN]]
        labels = ["picture", "decoded"]
        sheet = contact_sheet(rows, np.repeat(labels, len(rows) // 2).tolist(), len(rows) // 2)
        sheet.save(trainer.sample_path("reconstructions"))
        found = {metric: psnr(decoded, validation)}
        if true is not None:
            found["validation_right"] = right_share(read[..., -SEEN_CHANNELS:], true)
        return found

    if not args.init_from and latest_checkpoint(args.run_dir) is None:
        with announce("finding the principal components of the pictures ..."):
            start_from_components(model, first_crops(source, args))
    ahead: Any = Prefetched(source)

    def batches(number: int) -> Batch:
        if stickers:
            pictures, _ = ahead.batch(number, args.batch_size)
            maps = ahead.semantics(number, args.batch_size, factor=model.config.downsampling)
            return {"pictures": from_uint8(pictures), "seen": mx.array(maps)}
        pictures = crops(ahead, number, count=args.batch_size, size=args.crop, seed=args.seed)
        if encoder is None:
            return {"pictures": pictures}
        return {"pictures": pictures, "latents": encoder.encode(pictures)}

    trainer = Trainer(
        model,
        Reconstruction(
            args.kl_weight,
            decoder_only=args.decoder_only or args.semantic_latents,
            semantics_frozen=args.decoder_only,
            semantic_weights=loss_weights(),
        ),
        batches=batches,
        config=TrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            accumulate=args.accumulate,
            checkpoint_every=args.checkpoint_every,
            learning_rate=args.learning_rate,
            optimizer=args.optimizer,
            weight_decay=0.0,
            warmup_steps=warmup_of(args.steps, 300),
            seed=args.seed,
        ),
        run_dir=args.run_dir,
        validate=validate,
    )
    trainer.run()
    return trainer.exit_code


if __name__ == "__main__":
    run_command(main)
