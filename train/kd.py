"""Distil a teacher into an elastic model: `python -m train.kd --teacher FOLDER --run-dir DIR ...`.

SnapGen++ section 3.3, eqs. 6-8, at every elastic width. The full network and one sampled
sub-network meet the same noisy latents as the teacher. Each learns the task's velocity (L_diff) and
the teacher's (L_out, eq. 6), weighed by the timestep-aware scaling S, and through a projector of
its own width the teacher's last-layer features (L_feat, eq. 7):

    L = S(L_diff, L_out) + L_feat                                                            (eq. 8)

As in flow matching, the sub-network also learns from the full one (eq. 5), and the gradients of the
two are brought to the same norm. Latents are those of the teacher's autoencoder; text is each one's
own: the teacher reads the caption with its own encoders, and the empty prompt where the student is
told nothing.
"""

import argparse
import dataclasses
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.config import STICKERS
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.settings import parse_width
from mlx_snapgen.teachers.checkpoint import load_teacher
from train.data.taught import TaughtData
from train.evaluation.previews import previews_of
from train.loop.checkpoint import latest_checkpoint
from train.loop.run import start_from
from train.loop.trainer import Trainer
from train.objectives.distillation import Student, fit_to_teacher, make_gradients
from train.objectives.elastic import sampled_widths
from train.options import add_arguments, make_data, training_config


def make_student(args: argparse.Namespace, autoencoder: Autoencoder, feature_dims: int) -> Student:
    """The student that the options ask for, with the weights that it starts from."""
    if args.init_from and (args.init_from / "config.json").is_file():
        if args.student_config or args.tokenizer:
            raise UserError(
                f"{args.init_from} is a model: it brings sizes and tokenizers, leave out "
                "--student-config and --tokenizer"
            )
        components = load_pretrained(args.init_from)
        config, tokenizers = components.config, [e.tokenizer for e in components.text_encoders]
    elif args.tokenizer:
        config = load_config(args.student_config) if args.student_config else STICKERS
        tokenizers = [load_tokenizer(args.tokenizer, c) for c in config.text_encoders]
    else:
        raise UserError("the student needs --tokenizer, or a model folder to start from")
    config = dataclasses.replace(config, autoencoder=autoencoder.config)
    student = Student(config, tokenizers, feature_dims)
    if args.init_from:
        start_from(student, args.init_from)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.kd",
        description="Distil a teacher into an elastic model. Run again with the same folder to "
        "resume.",
    )
    add_arguments(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the teacher")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the teacher (default none)")
    parser.add_argument(
        "--student-config",
        type=Path,
        metavar="FOLDER",
        help="sizes of the student, as config.json in this folder (default: the stickers model)",
    )
    parser.add_argument("--tokenizer", type=Path, help="the student's, a sentencepiece .model file")
    args = parser.parse_args()

    mx.random.seed(args.seed)
    teacher, autoencoder = load_teacher(args.teacher)
    student = make_student(args, autoencoder, teacher.feature_dims)
    student.transformer.checkpoint_blocks(args.save_memory)
    widths = [parse_width(name).share for name in args.widths]
    for width in widths:
        student.transformer.config.width_index(width)
    tokenizers = [encoder.tokenizer for encoder in student.text_encoders]
    data = TaughtData(make_data(args, autoencoder, tokenizers), teacher)
    if args.init_from and latest_checkpoint(args.run_dir) is None:
        fit_to_teacher(student, teacher, [data(k) for k in range(8)], args.seed, args.time_shift)
    Trainer(
        student,
        make_gradients(teacher, args.guidance),
        data,
        training_config(args),
        args.run_dir,
        static=lambda step: (
            sampled_widths(widths, args.seed, step, args.sub_networks),
            args.time_shift,
        ),
        validate=previews_of(student, autoencoder, args.time_shift, args.widths),
    ).run()


if __name__ == "__main__":
    run_command(main)
