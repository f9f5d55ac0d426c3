"""Fine-tune a model on your own pictures: `python -m train.lora --data FOLDER`.

With `--thing`, which the built-in model needs, the pictures are cut-outs of one thing. It gets a
code and rows of the decoder's table (mlx_snapgen/lora/things.py); the LoRA is trained on scenes
that are not drawn (train/data/stickers/own_thing.py).

Without, a LoRA is trained on the pictures of a folder and their captions
(train/data/imagefolder.py), at every width; prior preservation limits forgetting
(train/objectives/finetune.py). A public model is trained on frozen weights, quantized or not.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from PIL.Image import Image

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import Components, load_pretrained, warn_untrained
from mlx_snapgen.checkpoint.module import on_device
from mlx_snapgen.cli.notices import announce, picture_bar
from mlx_snapgen.cli.options import model_choice
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError, one_line, run_command
from mlx_snapgen.errors import plural as number_of
from mlx_snapgen.lora.adapters import add_lora, train_only
from mlx_snapgen.lora.files import MOST_WORDS, save_lora
from mlx_snapgen.lora.things import Thing, add_thing
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.open_model import open_model
from mlx_snapgen.settings import BUILT_IN, has_memory, machine_memory
from mlx_snapgen.teachers.config import NAMES
from mlx_snapgen.teachers.folder import TeacherFolder, load_network
from mlx_snapgen.vocabulary import with_article
from train.data.encoded import CodedBatches, EncodedFolder, TuningBatches
from train.data.imagefolder import (
    Example,
    PictureFolder,
    bucket_sizes,
    describe,
    digest,
    read_folder,
)
from train.data.prior import draw_prior
from train.data.prompts import spread
from train.data.public import PublicPictures
from train.data.stickers.own_thing import (
    MOST_LOOKS,
    OwnThing,
    check_names,
    examples_of,
    fitted,
    is_cutout,
    known_scenes_of,
    num_free,
    read_cutouts,
    spare_codes,
    table_rows,
)
from train.data.stickers.source import known_prompts
from train.evaluation.drift import Validation
from train.evaluation.estimate import Estimate, estimate, num_trainable
from train.evaluation.public import PublicValidation, estimate_public, training_memory
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.base import ShareStep
from train.objectives.finetune import FineTuning, PublicFineTuning, step_share
from train.options.common import tuning_config, widths_of
from train.options.lora import fill, parse

NAME = "default"  # of the adapter
EARLY_SHARE = 0.5
"""Of a thing's scenes, whose prompts decide the layout; see `noisy`."""


def _print_estimate(args: argparse.Namespace, needed: Estimate, *, pictures: int) -> None:
    print(f"estimate: {needed.text(args.steps, pictures)}", flush=True)
    if needed.memory > machine_memory():
        print(
            f"{has_memory()} {machine_memory() / 1e9:.0f} GB: give --save-memory, or a smaller "
            "--batch-size with --accumulate",
            file=sys.stderr,
        )


CACHE_BYTES = 1 << 29
"""Freed memory that MLX keeps while a public model is trained."""


def main() -> int:
    args = parse()
    with announce(f"loading {args.model} ..."):
        folder = open_model(model_choice(args))
    mx.random.seed(args.seed)
    fill(args, folder.config if isinstance(folder, TeacherFolder) else None)
    if isinstance(folder, TeacherFolder):
        return train_public(args, folder)
    return train_own(args, folder)


def read_examples(
    args: argparse.Namespace,
    *,
    size: tuple[int, int],
    unit: int,
    any_shape: bool = True,
    has_alpha: bool = False,
) -> list[Example]:
    """The pictures in sizes like `size`, or in that size alone."""
    sizes = bucket_sizes(size, unit) if any_shape else [size]
    examples, skipped = read_folder(
        args.data, sizes, has_alpha=has_alpha, template=args.caption_template
    )
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    print(f"{describe(examples)}, {len(skipped)} skipped")
    return examples


def claim_run(args: argparse.Namespace, examples: Sequence[Example], **more: object) -> None:
    """Record the run, unless it is a dry one."""
    names = ("model", "revision", "base", "rank", "alpha", "targets")
    settings = {name: getattr(args, name) for name in names} | more
    if not args.dry_run:
        settings = {"pictures": digest(examples)} | settings
        # The LoRA file says what it was trained at.
        claim(args.run_dir, settings, newer=["model_widths"])


def train_public(args: argparse.Namespace, folder: TeacherFolder) -> int:
    """Train a LoRA of a public model."""
    config, size = folder.config, (args.resolution, args.resolution)
    widths = [width.name for width in widths_of(args, config)]
    bits = (config.quantization or {"bits": 0})["bits"]
    if config.is_distilled:
        print(
            f"note: {config.name} is distilled, which training undoes: a LoRA of "
            f"{NAMES[config.kind, False]} also works with it",
            file=sys.stderr,
        )
    any_shape = not config.trained_sizes
    examples = read_examples(args, size=size, unit=config.size_unit, any_shape=any_shape)
    claim_run(args, examples, resolution=args.resolution, bits=bits, model_widths=widths)
    network: Any = load_network(folder.path, config, dtype=on_device(None))
    add_lora(network, args.rank, alpha=args.alpha, targets=args.targets, name=NAME)
    train_only(network, NAME)
    captions = [example.caption for example in examples]
    prompts = args.validation_prompts or spread(captions, 2)
    memory = training_memory(
        folder,
        network,
        size=size,
        batch_size=args.batch_size,
        texts=1 + len({*captions, *prompts}),
    )
    print(
        f"training {num_trainable(network):,} parameters (rank {args.rank}) of {config.name}"
        f"{f' in {bits} bits' if bits else ''} takes about {memory / 1e9:.1f} GB of memory",
        flush=True,
    )
    if memory > machine_memory():
        raise UserError(
            f"{has_memory()} {machine_memory() / 1e9:.1f} GB: choose a smaller --resolution, "
            "--batch-size 1 with --accumulate, or --quantize 4"
        )
    mx.set_cache_limit(CACHE_BYTES)
    with announce("encoding the pictures and captions ..."):
        data = PublicPictures(
            folder,
            PictureFolder(examples, seed=args.seed, flip=args.flip),
            batch_size=args.batch_size,
            drop_caption=args.drop_caption,
            prompts=prompts,
        )
    mx.eval(network.parameters())
    network.checkpoint_blocks()
    validation = PublicValidation(folder, network, data, prompts=prompts)
    with announce("measuring a step ..."):
        needed = estimate_public(validation, memory=memory, accumulate=args.accumulate)
    _print_estimate(args, needed, pictures=-(-args.steps // args.checkpoint_every) * len(prompts))
    if args.dry_run:
        return 0
    trainer = Trainer(
        network,
        PublicFineTuning(),
        batches=data,
        config=tuning_config(args, accumulate=args.accumulate),
        run_dir=args.run_dir,
        validate=validation,
    )
    mx.set_cache_limit(CACHE_BYTES)
    return finish(args, trainer, base_model=config.name, captions=captions, with_alpha=False)


def train_own(args: argparse.Namespace, folder: ModelFolder) -> int:
    """Train a LoRA of a model of this project."""
    given = list(read_prompts(args.prior_prompts)) if args.prior_prompts else None
    if args.thing is not None and folder.config.autoencoder.semantics is None:
        raise UserError(f"--thing takes a model with semantic latents: {args.model} has none")
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(folder)
    network, config = components.transformer, components.config
    warn_untrained(network, args.model, result="with a LoRA it still draws noise")
    trained = widths_of(args, config)
    shares, widths = [width.share for width in trained], [width.name for width in trained]
    add_lora(network, args.rank, alpha=args.alpha, targets=args.targets, name=NAME)
    train_only(network, NAME)
    lessons = (_of_pictures if args.thing is None else _of_thing)(args, components, widths)
    data, captions = lessons.data, lessons.captions
    network.checkpoint_blocks(args.save_memory)
    # With a thing, scenes of known things need not be drawn.
    wanted = args.prior_pictures if args.prior_weight and lessons.thing is None else 0
    prior_prompts = known_prompts(components, wanted) if given is None else given[:wanted]
    if wanted and not prior_prompts:
        print("no prior preservation without prompts: give --prior-prompts", file=sys.stderr)
    others = prior_prompts if lessons.thing is None else known_prompts(components, 2)
    prompts = args.validation_prompts or [*spread(captions, 4), *spread(others, 2)]

    def arguments(step: int) -> ShareStep:
        return ShareStep(step_share(shares, seed=args.seed, step=step))

    print(
        f"training {num_trainable(network):,} parameters (rank {args.rank}) at "
        f"{', '.join(widths)} in {args.run_dir}",
        flush=True,
    )
    # Prior samples do not exist yet; other pictures take the same time.
    if prior_prompts:
        data.prior = data.buckets[0]
    steps = Counter(arguments(k).share for k in range(1000))
    often = {share: count / steps.total() for share, count in steps.items()}
    with announce("measuring a step ..."):
        needed = estimate(components, data(0), shares=often, accumulate=args.accumulate)
    validations = -(-args.steps // args.checkpoint_every)
    _print_estimate(args, needed, pictures=len(prior_prompts) + validations * len(prompts))
    if args.dry_run:
        return 0
    if prior_prompts:
        data.prior = draw_prior(components, prior_prompts)
    trainer = Trainer(
        network,
        FineTuning(
            config.time_shift(*config.image_size),
            args.prior_weight,
            0.0 if lessons.thing is None else EARLY_SHARE,
        ),
        batches=data,
        config=tuning_config(args, accumulate=args.accumulate),
        run_dir=args.run_dir,
        arguments=arguments,
        validate=Validation(components, data, prompts, width=widths[0]),
    )
    return finish(
        args,
        trainer,
        base_model=config.name,
        captions=captions,
        widths=widths,
        thing=lessons.thing,
        rows=lessons.rows,
    )


@dataclasses.dataclass
class Lessons:
    """What a LoRA of a model of this project is trained on.

    Attributes:
        captions: examples of them.
        thing: a new one, or None, with its `rows` of the decoder's table.
    """

    data: TuningBatches
    captions: list[str]
    thing: Thing | None = None
    rows: mx.array | None = None


def _of_pictures(args: argparse.Namespace, components: Components, widths: list[str]) -> Lessons:
    """Pictures with captions; the run is recorded."""
    config = components.config
    examples = read_examples(
        args,
        size=config.image_size,
        unit=config.size_unit,
        has_alpha=config.autoencoder.picture_channels == 4,
    )
    if num_free(config.autoencoder.semantics):
        cut_out = all(is_cutout(example.pixels) for example in examples)
        print(
            "note: this model draws what has no code as a blur; if the pictures show one thing, "
            f"{'' if cut_out else 'cut it out (transparent around it) and '}add --thing NOUN",
            file=sys.stderr,
        )
    claim_run(args, examples, model_widths=widths)
    pictures = PictureFolder(examples, seed=args.seed, flip=args.flip)
    with announce("encoding the pictures ..."):
        data = EncodedFolder(
            components, pictures, batch_size=args.batch_size, drop_caption=args.drop_caption
        )
    return Lessons(data, [example.caption for example in examples])


def _of_thing(args: argparse.Namespace, components: Components, widths: list[str]) -> Lessons:
    """Scenes with a new thing, which the autoencoder gets; the run is recorded."""
    name, plural = check_names(components, args.thing, args.plural)
    known = known_scenes_of(components, seed=args.seed)
    autoencoder = components.autoencoder
    semantics = autoencoder.config.semantics
    assert semantics is not None
    cutouts, skipped = read_cutouts(args.data)
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    codes = spare_codes(semantics, name, min(MOST_LOOKS, len(cutouts)), seed=args.seed)
    used, rest = cutouts[: len(codes)], cutouts[len(codes) :]
    print(f"{name}, {plural}: {number_of(len(used), 'look')}, {len(skipped)} skipped")
    if rest:
        left_out = one_line(", ".join(path.name for path, _ in rest), 200)
        print(f"left out, a thing has at most {len(used)} looks: {left_out}", file=sys.stderr)
    side = semantics.sides[-1] * autoencoder.config.downsampling
    claim_run(args, examples_of(used, side=side), model_widths=widths, thing=name, plural=plural)
    thing = Thing(name, plural, codes, semantics.things, semantics.sides)
    rows = _rows(autoencoder, [picture for _, picture in used], fit=not args.dry_run)
    add_thing(autoencoder, thing, rows)
    data = CodedBatches(
        components,
        OwnThing(known, thing),
        prior=known if args.prior_weight else None,
        batch_size=args.batch_size,
        drop_caption=args.drop_caption,
        seed=args.seed,
    )
    one, three = with_article(name), f"three {plural}"
    captions = [one, three, f"{one} to the left of a cat", f"a big {name} on a blue background"]
    return Lessons(data, captions, thing, rows)


def _rows(autoencoder: Autoencoder, cutouts: Sequence[Image], *, fit: bool) -> mx.array:
    """The rows of the decoder's table for cut-outs, which are also fitted to it if `fit`."""
    found = []
    with picture_bar(len(cutouts), "encoding the pictures") as progress:
        for cutout in cutouts:
            rows = table_rows(autoencoder, cutout)
            found.append(fitted(autoencoder, cutout, rows) if fit else rows)
            mx.eval(found)
            progress(1)
    return mx.concatenate(found)


def finish(
    args: argparse.Namespace,
    trainer: Trainer,
    *,
    base_model: str,
    captions: Sequence[str],
    widths: Sequence[str] = (),
    with_alpha: bool = True,
    thing: Thing | None = None,
    rows: mx.array | None = None,
) -> int:
    """Train, and write the LoRA; returns the exit code.

    Args:
        widths: names of those of an elastic network.
        thing, rows: see `Lessons`.
    """
    if trainer.run() and trainer.is_main:
        with trainer.averaged(), announce(f"writing {args.output} ..."):
            save_lora(
                args.output,
                trainer.model,
                name=NAME,
                base_model=base_model,
                words=caption_words(captions) if thing is None else thing.words,
                widths=widths,
                with_alpha=with_alpha,
                thing=thing,
                rows=rows,
            )
        words = [captions[0], *([] if args.model == BUILT_IN else ["--model", args.model])]
        for name in ("revision", "base"):
            if (value := getattr(args, name)) is not None:
                words += [f"--{name}", value]
        print(f"{args.output} is complete. To draw with it:")
        draw = shlex.join([*words, "--lora", str(args.output)])
        print(f"python -m mlx_snapgen.generate {draw}")
    return trainer.exit_code


COMMON = {"the", "and", "with", "from", "for", "its", "this", "that", "next", "above", "below"}


def caption_words(captions: Sequence[str]) -> list[str]:
    """The words of captions that may name things: of three letters or more, the common left out."""
    words = Counter(word for text in captions for word in re.findall(r"[^\W\d_]{3,}", text.lower()))
    return sorted(word for word, _ in words.most_common(MOST_WORDS) if word not in COMMON)


if __name__ == "__main__":
    run_command(main)
