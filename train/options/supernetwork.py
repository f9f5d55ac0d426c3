"""Options of the trainers of a supernetwork: `train.flow` and `train.kd`."""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import Components, load_pretrained
from mlx_snapgen.checkpoint.text_encoders import SOURCE_FILES
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser, add_model, add_model_widths, finite_number, integer
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.settings import Width, has_memory, machine_memory
from train.data.encoded import EncodedBatches, as_latents, check_encoding
from train.data.mixture import Prefetched, num_samples, sizes_in
from train.data.prepared import describe_autoencoder
from train.data.prompts import spread
from train.data.text import KnownPrompts, is_trained
from train.evaluation.memory import training_memory
from train.evaluation.previews import previews_of
from train.evaluation.validation import FlowValidation, held_out_batches
from train.loop.config import TrainingConfig, warmup_of
from train.loop.distributed import print_once
from train.loop.run import claim_training, digest_files
from train.loop.teacher import prepared_parts
from train.loop.trainer import Trainer
from train.objectives.elastic import ElasticStep, TextToLatents, sampled_shares
from train.objectives.losses import MEASURED, channel_weights
from train.options.common import (
    MOST,
    add_channel_weights,
    add_drop_caption,
    add_number,
    add_removed,
    add_run_dir,
    add_seed,
    check_at_least,
    check_at_most,
    check_channel_weights,
    check_learning_rate,
    validation_batch,
    widths_of,
)
from train.options.data import add_data, check_data, check_not_empty, data_from, picture_size

NUM_PREVIEWS = 8
WARMUP = 200
REMOVED = {
    "--autoencoder": "the autoencoder is that of --model, a folder that train.new writes",
    "--tokenizer": "the tokenizer is that of --model, a folder that train.new writes",
    "--student-config": "the sizes are those of --model, a folder that train.new writes",
    "--num-nouns": "give --data stickers:nouns=N",
    "--categories": "give --data stickers:categories=NAME+NAME",
}


def new_parser(prog: str, description: str) -> Parser:
    """A parser with the options of every trainer of a supernetwork."""
    parser = Parser(
        prog=prog,
        description=f"{description} Run again with the same --run-dir to resume.",
        renamed={"--widths": "--model-widths", "--noises-per-scene": "--noises-per-picture"},
    )
    add = parser.add_argument
    add_model(parser, default=None)
    add_run_dir(parser)
    add_data(parser)
    add_number(parser, "--steps", 6000, "training steps")
    add_number(parser, "--batch-size", 32, "pictures per micro-batch in each process")
    add_number(
        parser, "--accumulate", 1, "micro-batches of different pictures per step in each process"
    )
    add_number(
        parser,
        "--noises-per-picture",
        1,
        "use the pictures of each micro-batch so many times per step, with different noise",
    )
    add_number(
        parser,
        "--learning-rate",
        3e-4,
        "AdamW learning rate; matrix parameters under Muon use 20x; above 1e-3 the loss rises",
    )
    add_number(parser, "--final-learning-rate", 1e-5, "learning rate of the last step")
    add(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="optimizer; muon needs fewer steps, but on a CPU each step takes 1/3 longer "
        "(default: %(default)s)",
    )
    add(
        "--warmup-steps",
        type=integer(0, MOST),
        metavar="N",
        help=f"steps of linear warm-up (default: {WARMUP}, or a sixth of --steps if that is less)",
    )
    add_number(parser, "--ema-decay", 0.999, "decay of the averaged weights")
    add_number(
        parser, "--checkpoint-every", 250, "steps between checkpoints, each with a validation"
    )
    add(
        "--validation-prompts",
        nargs="+",
        metavar="PROMPT",
        help="prompts to draw after every checkpoint (default: captions of the data)",
    )
    add_number(
        parser,
        "--validation-pictures",
        64,
        "pictures kept for validation to measure the loss with after every checkpoint; 0 is off",
    )
    each = "; of several text encoders, each one also misses this share on its own"
    add_drop_caption(parser, more=each)
    add(
        "--time-shift",
        type=finite_number,
        metavar="N",
        help="shift of the noise levels; a higher value trains more on very noisy latents, where "
        "the prompt matters most (default: the model's)",
    )
    also = "; every step trains full too, but validation and previews are of these alone"
    add_model_widths(parser, default=None, more=also)
    add_channel_weights(parser)
    add_number(
        parser, "--sub-networks", 1, "sub-networks to train per step beside the full network"
    )
    add(
        "--save-memory",
        action="store_true",
        help="recompute the blocks in the backward pass: half the memory, 1/3 more time "
        "(default: off)",
    )
    add(
        "--init-from",
        type=Path,
        metavar="MODEL",
        help="start from the weights of this run folder or model (default: those of --model)",
    )
    add_seed(parser)
    add_removed(parser, REMOVED)
    return parser


def check(args: argparse.Namespace) -> ModelFolder:
    """The folder of `--model`; `UserError` for invalid values.

    `model_widths` becomes the list of `Width`s to train, `time_shift` the model's.
    """
    at_least_1 = ("steps", "batch_size", "accumulate", "noises_per_picture", "checkpoint_every")
    check_at_least(args, 1, *at_least_1, "sub_networks")
    check_at_least(args, 0, "seed", "drop_caption", "final_learning_rate")
    check_at_least(args, 0, "ema_decay", "validation_pictures")
    check_at_most(args, 1, "drop_caption", "ema_decay", "final_learning_rate")
    check_channel_weights(args)
    check_learning_rate(args.learning_rate)
    if args.time_shift is not None and args.time_shift <= 0:
        raise UserError(f"--time-shift must be above 0, got {args.time_shift}")
    folder = ModelFolder.open(args.model)
    config = folder.config
    check_data(args, unit=config.size_unit)
    args.model_widths = widths_of(args, config)
    most = len([width for width in args.model_widths if width.share != 1.0])
    if args.sub_networks > max(1, most):
        raise UserError(f"--sub-networks {args.sub_networks}: --model-widths has only {most}")
    if args.time_shift is None:
        args.time_shift = config.sampler.time_shift
    return folder


def open_source(args: argparse.Namespace, config: ModelConfig) -> Any:
    """The data of the options for a model: see `open_data`."""
    with announce("reading the data ..."):
        source = data_from(
            args,
            size=config.image_size,
            unit=config.size_unit,
            seed=args.seed,
            run_dir=args.run_dir,
        )
    check_not_empty(source)
    return source


def load_model(args: argparse.Namespace, folder: ModelFolder, source: Any) -> Components:
    """The model to train, without a few-step mode.

    A frozen text encoder whose states are in the data is freed; the previews' prompts are kept.
    """
    parts = prepared_parts(source)
    for part in parts:
        part.check_text_states(folder.config.text_encoders)
    with announce(f"loading {folder.source or 'stickers'} ..."):
        components = load_pretrained(folder)
        encoders = components.text_encoders
        for i in range(len(encoders)):
            if parts and all(f"text_encoder_{i}" in part.text_states for part in parts):
                encoders[i] = KnownPrompts(encoders[i], preview_prompts(args, source))
    mx.clear_cache()
    return components


def preview_prompts(args: argparse.Namespace, source: Any) -> list[str]:
    """The prompts to draw after every checkpoint."""
    return args.validation_prompts or spread(source.prompts(0, 64), NUM_PREVIEWS)


def shares_of(args: argparse.Namespace) -> list[float]:
    """The shares of the widths to train."""
    return [width.share for width in args.model_widths]


def make_batches(
    args: argparse.Namespace, source: Any, autoencoder: Autoencoder, *, model: TextToLatents
) -> EncodedBatches:
    """Batches of the data for a model, read ahead in the background.

    Raises:
        UserError: the machine has too little memory for a batch.
    """
    size = picture_size(args, source, size=model.config.image_size)
    if not prepared_parts(source):
        side = round(math.sqrt(size[0] * size[1]))
        with announce("measuring the autoencoder ..."):
            check_encoding([autoencoder], side, batch_size=args.batch_size)
    _check_training_memory(args, model, size)
    return EncodedBatches(
        as_latents(Prefetched(source), autoencoder),
        model.encoders,
        batch_size=args.batch_size,
        seed=args.seed,
        drop_caption=args.drop_caption,
        absent=model.config.unconditional == "absent",
        noises_per_picture=args.noises_per_picture,
    )


def _check_training_memory(
    args: argparse.Namespace, model: TextToLatents, size: tuple[int, int]
) -> None:
    """A line if a step may need more memory than there is; `UserError` if it is twice as much.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    config, factor = model.config, model.config.autoencoder.downsampling
    own = sum(p.size for encoder in model.text_encoders for p in flat_parameters(encoder).values())
    needed = training_memory(
        config.transformer,
        latents=(size[0] // factor, size[1] // factor),
        batch_size=args.batch_size,
        save_memory=args.save_memory,
        sub_networks=args.sub_networks if len(args.model_widths) > 1 else 0,
        text_tokens=sum(e.max_length for e in config.text_encoders),
        text_parameters=own,
        compute_bytes=training_config(args).dtype.size,
        optimizer=args.optimizer,
    )
    memory = machine_memory()
    text = (
        f"a step takes about {needed / 2**30:.1f} GiB of memory, and {has_memory()} "
        f"{memory / 2**30:.1f}: choose a smaller --batch-size with --accumulate"
        + ("" if args.save_memory else ", or --save-memory")
    )
    if needed > 2 * memory:
        raise UserError(text)
    if needed > memory:
        print_once(f"warning: {text}")


def weights_of(
    args: argparse.Namespace, batches: EncodedBatches, autoencoder: Autoencoder
) -> mx.array | None:
    """`channel_weights` on the first pictures of the data, for --channel-weights."""
    if not args.channel_weights:
        return None
    with announce("measuring the channels of the latents ..."):
        latents = batches.samples(0).latents[:MEASURED]
        return channel_weights(autoencoder, latents, power=args.channel_weights)


def claim_run(
    args: argparse.Namespace,
    source: Any,
    folder: ModelFolder,
    *,
    components: Components,
    trained: TextToLatents,
    fixed: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Record what `train.export` needs, and what must stay when the run is resumed.

    Args:
        components: the model, loaded from `folder`.
        trained: its networks.
        fixed: what else must stay.
        options: of the command, see `OPTIONS`.
    """
    size = picture_size(args, source, size=folder.config.image_size)
    sampling = {
        "image_size": size,
        "trained_sizes": sorted(sizes_in(source)) or [size],
        "time_shift": args.time_shift,
    }
    # The trainer only checks the micro-batches of a step: accumulate x noises x processes.
    fixed = {
        "noises_per_picture": args.noises_per_picture,
        **digests(components),
        **frozen_digests(folder),
        **(fixed or {}),
    }
    claim_training(
        args.run_dir,
        source.settings(),
        steps=args.steps,
        model=folder,
        trained=trained,
        sampling=sampling,
        fixed=fixed,
        options={
            "drop_caption": args.drop_caption,
            "time_shift": args.time_shift,
            "model_widths": [width.name for width in args.model_widths],
            "sub_networks": args.sub_networks,
            "channel_weights": args.channel_weights,
            "init_from": args.init_from and str(args.init_from),
            **(options or {}),
        },
    )


def print_passes(args: argparse.Namespace, source: Any) -> None:
    """Print how often training uses each picture."""
    group = mx.distributed.init()
    if group.rank():
        return
    used = args.steps * args.batch_size * args.accumulate * group.size()
    count = num_samples(source)
    passes = ""
    if count is not None:
        number = used / count
        shown = f"{number:.2g}" if number < 10 else f"{number:,.0f}"
        passes = f", {shown} passes over {plural(count, 'picture')}"
    print(f"{plural(args.steps, 'step')}: {plural(used, 'sample')}{passes}")


def digests(components: Components) -> dict[str, Any]:
    """Hashes of what the latents and the tokens of training depend on."""
    trained = [e for e in components.text_encoders if is_trained(e.config)]
    return {
        "autoencoder_digest": describe_autoencoder(components.autoencoder)["digest"],
        "tokenizer_digests": [
            hashlib.blake2b(e.tokenizer.model, digest_size=16).hexdigest() for e in trained
        ],
    }


def frozen_digests(folder: ModelFolder) -> dict[str, Any]:
    """Hashes of the public text encoders of a loaded model; empty if it has none."""
    frozen = [config for config in folder.config.text_encoders if config in folder.sources]
    found = [digest_files(folder.sources[c], SOURCE_FILES[c.kind]) for c in frozen]
    return {"frozen_text_encoders": found} if found else {}


def step_arguments(args: argparse.Namespace) -> Callable[[int], ElasticStep]:
    """Step -> the arguments of an elastic objective."""
    shares = shares_of(args)

    def arguments(step: int) -> ElasticStep:
        sampled = sampled_shares(shares, seed=args.seed, step=step, count=args.sub_networks)
        return ElasticStep(sampled, args.time_shift)

    return arguments


def make_validation(
    args: argparse.Namespace, source: Any, autoencoder: Autoencoder, *, model: TextToLatents
) -> Callable[[Trainer], dict[str, float]]:
    """After every checkpoint: a sheet of pictures, and the loss on pictures kept for validation."""
    widths: list[Width] = args.model_widths
    previews = previews_of(
        model,
        autoencoder,
        preview_prompts(args, source),
        size=picture_size(args, source, size=model.config.image_size),
        time_shift=args.time_shift,
        widths=[width.name for width in widths],
        batch_size=validation_batch(args),
    )
    losses = _validation_losses(args, source, autoencoder, model=model)

    def validate(trainer: Trainer) -> dict[str, float]:
        return previews(trainer) | (losses(trainer) if losses else {})

    return validate


def _validation_losses(
    args: argparse.Namespace, source: Any, autoencoder: Autoencoder, *, model: TextToLatents
) -> FlowValidation | None:
    held_out = source.validation() if args.validation_pictures else None
    if held_out is None:
        if args.validation_pictures:
            print_once("no validation loss: the data keeps no pictures for it")
        return None
    parts = getattr(held_out, "sources", [held_out])
    count = -(-args.validation_pictures // len(parts))
    with announce("encoding the pictures kept for validation ..."):
        batches = [
            samples
            for part in parts
            for samples in held_out_batches(
                as_latents(part, autoencoder), count, batch_size=validation_batch(args)
            )
        ]
    return FlowValidation(
        model.transformer, model.encoders, batches=batches, widths=args.model_widths
    )


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate * args.noises_per_picture,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        final_learning_rate=args.final_learning_rate,
        warmup_steps=(
            warmup_of(args.steps, WARMUP) if args.warmup_steps is None else args.warmup_steps
        ),
        ema_decay=args.ema_decay,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
