"""Encode captioned pictures for training: `python -m train.prepare SOURCE... --output DIR`.

The result is a prepared set (train/data/prepared.py), which training reads with `--data DIR`.
"""

import argparse
import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_snapgen.checkpoint import model as checkpoint_model
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.module import read_part
from mlx_snapgen.checkpoint.text_encoders import chosen_encoders
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import expanded
from mlx_snapgen.formats import is_teacher
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.teachers.folder import load_teacher_config
from train.data.encoded import check_encoding
from train.data.imagefolder import bucket_sizes
from train.data.index import paths_of
from train.data.open import is_prepared, is_stickers, open_records
from train.data.prepared import MODEL, Prepared, describe_autoencoder
from train.data.selection import LEAST_TO_HOLD_OUT
from train.data.shards import INDEX, SETTINGS
from train.data.source import TEACHER, Record, RecordSource
from train.loop.autoencoder import load_autoencoder
from train.loop.run import digest_files, recorded
from train.loop.teacher import check_teacher, find_teacher
from train.options.data import MOST_SIDE, check_resolution, filter_from
from train.options.prepare import MOST_DRAWN_BATCHES, MOST_IN_SHARD, parse
from train.preparation.drawn import (
    DrawnSet,
    Teacher,
    open_drawing,
    open_teacher_texts,
    teacher_settings,
)
from train.preparation.encoders import CaptionEncoder, Encoder, of_encoder
from train.preparation.pictures import PictureSet, Reader
from train.preparation.work import Preparation, check_finished
from train.setup.data import note_few, print_columns

CAPTION = "caption"
"""Column of the captions if none is chosen."""
RESOLUTION = 256
"""By default, if there is only an autoencoder."""
TOKENS = 32
"""Tokens of a caption, for the estimate of a shard's size."""
MODEL_FILES = "**/*.safetensors", "**/*.json", "**/*.model"
"""Patterns of the files of a model, an autoencoder, a teacher or a run."""


def open_model(name: str) -> tuple[Autoencoder, ModelFolder | None]:
    """The autoencoder of a model, an autoencoder's folder or a run; and the model, if it is one."""
    folder = expanded(Path(name))
    if folder.is_dir() and not (folder / "config.json").is_file():
        return load_autoencoder(folder, None), None
    if folder.is_dir() and read_part(folder, "autoencoder") is not None:
        return checkpoint_model.load_autoencoder(folder), None
    model = ModelFolder.open(name)
    return checkpoint_model.load_autoencoder(model), model


def caption_encoders(
    model: ModelFolder | None, names: list[str]
) -> tuple[dict[str, CaptionEncoder], dict[str, Any]]:
    """Text encoders of a model whose states are stored, and their configs, by "text_encoder_i".

    Raises:
        UserError: no such encoder, or one that training changes.
    """
    if not names:
        return {}, {}
    if model is None:
        raise UserError("--text-states takes a model with text encoders as --model")
    configs = model.config.text_encoders
    chosen = [i for i, c in enumerate(chosen_encoders(configs, names)) if c]
    for i in chosen:
        if configs[i].kind == "transformer":
            raise UserError("--text-states: text encoders of this kind are trained, not frozen")
    loaded = checkpoint_model.load_text_encoders(model, names=names)
    encoders = {
        f"text_encoder_{i}": of_encoder(loaded[i], f"text_encoder_{i}", dims=configs[i].hidden_size)
        for i in chosen
    }
    return encoders, {f"text_encoder_{i}": to_dict(configs[i]) for i in chosen}


def chunk_size(encoder: Encoder, *, args: argparse.Namespace, columns: int) -> int:
    """Records of a chunk, so that its shard has about the size wanted."""
    each = sum(
        args.resolution**2 // a.config.downsampling**2 * a.config.latent_channels
        for a in [encoder.autoencoder, *encoder.others.values()]
    )
    each += sum(TOKENS * text.dims * columns for text in encoder.texts.values())
    most = args.batch_size * MOST_DRAWN_BATCHES if args.draw_with else MOST_IN_SHARD
    return max(1, min(most, args.shard_size * 10**6 // (2 * each)))


@dataclass
class Model:
    """What encodes pictures and captions, and how index.json describes it.

    Attributes:
        unit: sides of a bucket are multiples of this, in pixels.
    """

    encoder: Encoder
    unit: int
    autoencoders: dict[str, Any]
    text_states: dict[str, Any]

    @property
    def empty_states(self) -> dict[str, np.ndarray]:
        """The text states of the empty prompt."""
        return {name: text.of_empty() for name, text in self.encoder.texts.items()}


def load_model(args: argparse.Namespace, teacher: Teacher | None) -> Model:
    """The autoencoder and text encoders that the options choose.

    Args:
        teacher: text states and autoencoder of a teacher.
    """
    if args.model is None:
        assert teacher is not None
        autoencoder, model = teacher.autoencoder, None
    else:
        with announce(f"loading {args.model} ..."):
            autoencoder, model = open_model(args.model)
    if autoencoder.config.picture_channels != 3:
        raise UserError(f"{args.model}: its autoencoder takes alpha, and pictures here have none")
    texts, configs = caption_encoders(model, args.text_states)
    autoencoders, others = {MODEL: describe_autoencoder(autoencoder)}, {}
    if teacher is not None:
        texts[TEACHER], configs[TEACHER] = teacher.texts, teacher.settings
        described = describe_autoencoder(teacher.autoencoder)
        if described["digest"] != autoencoders[MODEL]["digest"]:
            autoencoders[TEACHER], others[TEACHER] = described, teacher.autoencoder
    encoder = Encoder(autoencoder, texts=texts, others=others, batch_size=args.batch_size)
    # Without a model: patches of 2, of which 2x2 are compressed to one.
    unit = model.config.size_unit if model else 4 * autoencoder.config.downsampling
    return Model(encoder, unit, autoencoders, configs)


def fingerprint(source: RecordSource, folder: Path) -> str:
    """A hash of the files of a source, the same on all machines that have copies of them."""
    if (then := recorded(folder).get("files")) is not None:
        # Unfinished sets of earlier versions have the hash with the times of the files.
        earlier = source.fingerprint()
        if then == earlier:
            return earlier
    return source.fingerprint(times=False)


def given_files(args: argparse.Namespace, teacher: Path | None) -> dict[str, Any]:
    """What a set's sizes, autoencoders and text states follow from; loads no model."""
    folders = {"teacher": teacher}
    if args.model is not None:
        folder = expanded(Path(args.model))
        folders["model"] = folder if folder.is_dir() else ModelFolder.open(args.model).path
    digests = {name: digest_files(f, MODEL_FILES) for name, f in folders.items() if f is not None}
    return {**digests, "text_states": args.text_states, "shard_size": args.shard_size}


def is_same(folder: Path, settings: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a complete set is surely the one that the command describes; loads no model.

    Args:
        settings: those that do not depend on a model's weights.
        given: of `given_files`; sets of earlier versions have none.

    Raises:
        UserError: it has other settings.
    """
    check_finished(folder, settings)
    return recorded(folder).get("given") == given


def prepare(args: argparse.Namespace, *, done: bool) -> Preparation | None:
    """Encode the pictures of the sources.

    Args:
        done: the set is complete.

    Returns:
        The work; None if the complete set is that of the command.
    """
    for spec in args.sources:
        if is_stickers(spec):
            raise UserError("stickers are rendered in training: there is nothing to prepare")
        if is_prepared(spec):
            raise UserError(f"{spec} is prepared already: give the pictures that it was made of")
    check_teacher(args)
    source = open_records(args.sources, template=args.caption_template, columns=args.captions or ())
    with announce("reading the names of the files ..."):
        files = fingerprint(source, args.output)
        few = len(list(itertools.islice(source.records(), LEAST_TO_HOLD_OUT))) < LEAST_TO_HOLD_OUT
    args.resolution = args.resolution or default_resolution(args, None)
    columns = args.captions or [CAPTION]
    settings = {
        "sources": source.settings()["data"],
        "files": files,
        "filter": filter_from(args).settings(),
        "caption_template": args.caption_template,
        **common_settings(args, columns=columns, few=few),
    }
    folder = find_teacher(args.teacher, args) if args.teacher else None
    given = given_files(args, folder)
    if done and is_same(args.output, settings, given):
        return None
    teacher = None
    if folder is not None:
        with announce(f"loading {args.teacher} ..."):
            teacher = open_teacher_texts(folder)
    model = load_model(args, teacher)
    index = describe(model, args, columns=columns)
    encoder = model.encoder
    with announce("measuring the autoencoder ..."):
        autoencoders = [encoder.autoencoder, *encoder.others.values()]
        check_encoding(autoencoders, args.resolution, batch_size=args.batch_size)
    first = next(iter(source.records()), None)
    if args.captions is None and isinstance(first, Record):
        print_columns(paths_of(source), list(first.captions))
    size = chunk_size(encoder, args=args, columns=len(columns))
    buckets = [(height, width) for height, width in index["buckets"]]
    work = PictureSet(
        source,
        Reader(buckets, filter_from(args), columns=columns, named=bool(args.captions)),
        encoder=encoder,
        chunk_size=size,
        workers=args.workers,
    )
    return preparation(work, args, model=model, index=index, settings=settings, given=given)


def draw(args: argparse.Namespace, *, done: bool) -> Preparation | None:
    """Let a teacher draw the pictures; see `prepare`."""
    prompts = list(read_prompts(args.prompts_file))
    folder = find_teacher(args.draw_with, args)
    args.resolution = args.resolution or default_resolution(args, folder)
    size = args.resolution, args.resolution
    few = len(prompts) * args.per_prompt < LEAST_TO_HOLD_OUT
    settings = {
        "sources": "drawn",
        "teacher": teacher_settings(folder),
        "prompts": hashlib.blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest(),
        "per_prompt": args.per_prompt,
        "steps": args.num_inference_steps,
        "guidance": args.guidance_scale,
        "seed": args.seed,
        **common_settings(args, columns=[CAPTION], few=few),
    }
    given = given_files(args, folder)
    if done and is_same(args.output, settings, given):
        return None
    with announce(f"loading {args.draw_with} ..."):
        drawing, teacher = open_drawing(
            folder,
            size=size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )
    model = load_model(args, teacher)
    index = describe(model, args, columns=[CAPTION])
    work = DrawnSet(
        drawing,
        teacher.autoencoder,
        encoder=model.encoder,
        prompts=prompts,
        per_prompt=args.per_prompt,
        seed=args.seed,
        size=size,
        column=CAPTION,
        chunk_size=chunk_size(model.encoder, args=args, columns=1),
    )
    return preparation(work, args, model=model, index=index, settings=settings, given=given)


def default_resolution(args: argparse.Namespace, teacher: Path | None) -> int:
    """That of the unfinished set, or of the model or the teacher, in its folder, that draws."""
    if then := recorded(args.output):
        found = then.get("resolution", RESOLUTION)
        if type(found) is not int or not 1 <= found <= MOST_SIDE:
            raise UserError(f"{args.output / SETTINGS} is damaged: give another --output")
        return found
    folder = teacher or expanded(Path(args.model))
    if teacher is not None and is_teacher(teacher):
        return load_teacher_config(teacher).image_size[0]
    no_model = folder.is_dir() and not (folder / "config.json").is_file()
    if no_model or (folder.is_dir() and read_part(folder, "autoencoder") is not None):
        return RESOLUTION
    config = ModelFolder.open(folder if folder.is_dir() else args.model).config
    unit = config.size_unit
    return max(unit, round(math.sqrt(math.prod(config.image_size)) / unit) * unit)


def describe(model: Model, args: argparse.Namespace, *, columns: list[str]) -> dict[str, Any]:
    """Values for index.json; `UserError` if the model does not take the resolution."""
    check_resolution(args.resolution, model.unit)
    size = args.resolution, args.resolution
    buckets = [size] if args.draw_with else bucket_sizes(size, model.unit)
    return {
        "resolution": args.resolution,
        "autoencoders": model.autoencoders,
        "captions": columns,
        "text_states": model.text_states,
        "buckets": [list(bucket) for bucket in buckets],
    }


def common_settings(args: argparse.Namespace, *, columns: list[str], few: bool) -> dict[str, Any]:
    """The settings that drawn sets and others have, as far as they depend on no model's weights.

    Args:
        few: too few pictures for a part for validation.
    """
    if few:
        note_few(args)
    return {
        "resolution": args.resolution,
        "captions": columns,
        "held_out": 0.0 if few else args.held_out,
        "batch_size": args.batch_size,
    }


def preparation(
    work: PictureSet | DrawnSet,
    args: argparse.Namespace,
    *,
    model: Model,
    index: dict[str, Any],
    settings: dict[str, Any],
    given: dict[str, Any],
) -> Preparation:
    """The work with all its settings."""
    return Preparation(
        args.output,
        work,
        settings={**settings, **index, "records_in_shard": work.chunk_size},
        index=index,
        given=given,
        shard=args.shard,
        empty_states=model.empty_states,
    )


def is_complete(folder: Path) -> bool:
    """Whether a set has its index and all shards; missing ones can be made again."""
    if not (folder / INDEX).is_file():
        return False
    try:
        Prepared(folder).check_files()
    except UserError:
        return False
    return True


def main() -> None:
    args = parse()
    done = is_complete(args.output)
    part, parts = args.shard
    # The parts run at the same time, and a small set has fewer shards than parts.
    if done and parts > 1:
        print(f"{args.output} is complete: nothing is left for part {part} of {parts}", flush=True)
        return
    work = draw(args, done=done) if args.draw_with else prepare(args, done=done)
    if work and not done:
        work.run(args.dry_run)
        return
    if work:
        check_finished(args.output, work.settings)
    print(f"{args.output} is complete")


if __name__ == "__main__":
    run_command(main)
