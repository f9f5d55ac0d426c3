"""The teacher of a run."""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import warn_untrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.open_model import find_description, open_model
from mlx_snapgen.settings import ModelChoice
from mlx_snapgen.teachers.base import Teacher
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher, load_teacher
from mlx_snapgen.teachers.flow import FlowTeacher
from train.data.conditions import Conditions
from train.data.prepared import prepared_parts
from train.data.source import TEACHER, Source
from train.loop.distributed import print_once
from train.loop.run import digest_files

MOST_DIFFERENCE = 0.3
"""Of latents of one picture by two autoencoders of the same latents, relative to their size: a tiny
encoder is not exact."""
SIDE = 64


def same_latents(one: Autoencoder, other: Autoencoder) -> bool:
    """Whether two autoencoders have the same latents; measured on a picture."""
    if one.config.latent_channels != other.config.latent_channels:
        return False
    rows, columns = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    waves = np.sin(5 * columns + 3 * rows**2)
    picture = mx.array(np.stack([rows, columns, waves], axis=-1)[None], mx.float32)
    a, b = (np.array(encoder.encode(picture).astype(mx.float32)) for encoder in (one, other))
    if a.shape != b.shape:
        return False
    return bool(np.square(a - b).mean() <= MOST_DIFFERENCE**2 * np.square(b).mean())


def find_teacher(model: str, args: argparse.Namespace) -> Path:
    """The folder of a teacher; a public model is fetched and converted first.

    Args:
        model: what the option for the teacher has.
        args: with the options of `add_teacher_source`.

    Raises:
        UserError: as `open_model`.
    """
    return open_model(_choice(model, args)).path


def check_teacher(args: argparse.Namespace) -> None:
    """`UserError` if there is no model for --teacher; a public one is not fetched yet."""
    if args.teacher:
        find_description(_choice(args.teacher, args))


def _choice(model: str, args: argparse.Namespace) -> ModelChoice:
    return ModelChoice(model, revision=args.teacher_revision, base=args.teacher_base)


def open_teacher(args: argparse.Namespace) -> tuple[Teacher, Autoencoder, str]:
    """The teacher of --teacher, its autoencoder, and `digest_files` of its folder."""
    folder = find_teacher(args.teacher, args)
    with announce(f"loading {args.teacher} ..."):
        teacher, autoencoder = load_teacher(folder)
    if isinstance(teacher, CheckpointTeacher):
        warn_untrained(teacher.network, args.teacher, result="the student learns noise from it")
    return teacher, autoencoder, digest_files(folder)


def conditions_for(teacher: Teacher, source: Source | None, *, name: str) -> Conditions:
    """The teacher's text, that of the data if it has this teacher's.

    If the data has the states of all captions, a public teacher's text encoder is freed.

    Args:
        source: of the run, or None.
        name: the teacher's, for a warning.
    """
    conditions = Conditions(teacher)
    parts = [] if source is None else prepared_parts(source)
    with_states = [part for part in parts if TEACHER in part.text_states]
    for part in with_states:
        part.wanted.add(TEACHER)
        if not conditions.same_states(part.samples(0, 1)):
            print_once(
                f"{part.folder} has text states of another teacher than {name}: captions are "
                "encoded during training"
            )
            return conditions
    conditions.stored = bool(with_states)
    if parts and with_states == parts and isinstance(teacher, FlowTeacher):
        teacher.free_text_encoder()
    return conditions


def check_teacher_latents(
    source: Source, autoencoder: Autoencoder, *, teacher: str, model: str
) -> None:
    """`UserError` unless prepared data also has the latents of a teacher's autoencoder."""
    parts = prepared_parts(source)
    for part in parts:
        part.check_autoencoder(autoencoder, teacher=teacher)
        part.wanted.add(TEACHER)
    if not parts:
        raise UserError(
            f"{teacher} has other latents than the model: encode the pictures for both with "
            f"train.prepare SOURCE --model {model} --teacher {teacher} --output FOLDER, and give "
            "--data FOLDER"
        )
