"""The parts of a training of a supernetwork, `train.flow` and `train.kd`, from their options."""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import Components, load_pretrained
from mlx_snapgen.checkpoint.text_encoders import SOURCE_FILES
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, plural
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.settings import BUILT_IN, has_memory, machine_memory
from train.data.encoded import EncodedBatches, as_latents, check_encoding
from train.data.mixture import Prefetched
from train.data.prepared import describe_autoencoder, prepared_parts
from train.data.source import Source
from train.data.text import KnownPrompts, is_trained
from train.evaluation.memory import training_memory
from train.evaluation.previews import previews_of
from train.evaluation.validation import FlowValidation, held_out_batches
from train.loop.distributed import print_once
from train.loop.run import claim_training, digest_files
from train.loop.trainer import Trainer
from train.objectives.elastic import ElasticStep, TextToLatents, sampled_shares
from train.objectives.losses import MEASURED, channel_weights
from train.options.common import validation_batch, widths_of
from train.options.supernetwork import training_config
from train.setup.data import picture_size, preview_prompts


def load_model(args: argparse.Namespace, folder: ModelFolder, source: Source) -> Components:
    """The model to train, without a few-step mode.

    A frozen text encoder whose states are in the data is freed; the previews' prompts are kept.
    """
    parts = prepared_parts(source)
    for part in parts:
        part.check_text_states(folder.config.text_encoders)
    with announce(f"loading {folder.source or BUILT_IN} ..."):
        components = load_pretrained(folder)
        encoders = components.text_encoders
        for i in range(len(encoders)):
            if parts and all(f"text_encoder_{i}" in part.text_states for part in parts):
                encoders[i] = KnownPrompts(encoders[i], preview_prompts(args, source))
    mx.clear_cache()
    return components


def make_batches(
    args: argparse.Namespace, source: Source, autoencoder: Autoencoder, *, model: TextToLatents
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
        sub_networks=args.sub_networks if len(widths_of(args, config)) > 1 else 0,
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
    source: Source,
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
        "trained_sizes": sorted(source.size_shares) or [size],
        "time_shift": args.time_shift,
    }
    # The trainer only checks the micro-batches of a step: accumulate x noises x processes.
    fixed = {
        "noises_per_picture": args.noises_per_picture,
        **_digests(folder, components),
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
            "early_share": args.early_share,
            "model_widths": [width.name for width in widths_of(args, folder.config)],
            "sub_networks": args.sub_networks,
            "channel_weights": args.channel_weights,
            "init_from": args.init_from and str(args.init_from),
            **(options or {}),
        },
    )


def print_passes(args: argparse.Namespace, source: Source) -> None:
    """Print how often training uses each picture."""
    group = mx.distributed.init()
    if group.rank():
        return
    used = args.steps * args.batch_size * args.accumulate * group.size()
    count = source.num_samples
    passes = ""
    if count is not None:
        number = used / count
        shown = f"{number:.2g}" if number < 10 else f"{number:,.0f}"
        passes = f", {shown} passes over {plural(count, 'picture')}"
    print(f"{plural(args.steps, 'step')}: {plural(used, 'sample')}{passes}")


def _digests(folder: ModelFolder, components: Components) -> dict[str, Any]:
    """Hashes of what latents, tokens and text states of training depend on; of a loaded folder."""
    frozen = [config for config in folder.config.text_encoders if config in folder.sources]
    found = [digest_files(folder.sources[c], SOURCE_FILES[c.kind]) for c in frozen]
    trained = [e for e in components.text_encoders if is_trained(e.config)]
    return {
        "autoencoder_digest": describe_autoencoder(components.autoencoder)["digest"],
        "tokenizer_digests": [
            hashlib.blake2b(e.tokenizer.model, digest_size=16).hexdigest() for e in trained
        ],
        **({"frozen_text_encoders": found} if found else {}),
    }


def step_arguments(args: argparse.Namespace, config: ModelConfig) -> Callable[[int], ElasticStep]:
    """Step -> the arguments of an elastic objective."""
    shares = [width.share for width in widths_of(args, config)]
    return lambda step: ElasticStep(
        sampled_shares(shares, seed=args.seed, step=step, count=args.sub_networks),
        args.time_shift,
        args.early_share,
    )


def make_validation(
    args: argparse.Namespace, source: Source, autoencoder: Autoencoder, *, model: TextToLatents
) -> Callable[[Trainer], dict[str, float]]:
    """After every checkpoint: a sheet of pictures, and the loss on pictures kept for validation."""
    widths = widths_of(args, model.config)
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
    return lambda trainer: previews(trainer) | (losses(trainer) if losses else {})


def _validation_losses(
    args: argparse.Namespace, source: Source, autoencoder: Autoencoder, *, model: TextToLatents
) -> FlowValidation | None:
    held_out = source.validation() if args.validation_pictures else None
    if held_out is None:
        if args.validation_pictures:
            print_once("no validation loss: the data keeps no pictures for it")
        return None
    parts = held_out.sources
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
        model.transformer, model.encoders, batches=batches, widths=widths_of(args, model.config)
    )
