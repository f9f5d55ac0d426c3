"""Distill a teacher into an elastic model: `python -m train.kd --teacher FOLDER --run-dir DIR ...`.

SnapGen++ section 3.3, eqs. 6-8, at every elastic width. The full network, one sampled sub-network
and the teacher get the same noisy latents. Each network learns the task's velocity (L_diff) and the
teacher's (L_out, eq. 6), weighted by the timestep-aware scaling S, and, through a projector for its
width, the teacher's last-layer features (L_feat, eq. 7):

    L = S(L_diff, L_out) + L_feat                                                            (eq. 8)

As in flow matching, the sub-network also learns from the full one (eq. 5), and the gradients of the
two are scaled to the same norm. Latents are those of the teacher's autoencoder. Student and teacher
each have their own text encoders; where the student's caption is dropped, the teacher gets the
empty prompt, too.
"""

import argparse
import dataclasses
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.teachers.checkpoint import load_teacher
from train.data.distillation import DistillationBatches
from train.data.stickers import source as stickers
from train.data.stickers.model import STICKERS
from train.loop.checkpoint import latest_checkpoint
from train.loop.run import claim_data, find_folder, start_from
from train.loop.trainer import Trainer
from train.objectives.distillation import Distillation, Student, fit_to_teacher
from train.options import supernetwork as options
from train.options.common import add_number


def make_student(
    args: argparse.Namespace, autoencoder: Autoencoder, *, feature_dims: int
) -> Student:
    """The student of the options, with the weights that it starts from."""
    if args.init_from and (args.init_from / "config.json").is_file():
        if args.student_config or args.tokenizer:
            raise UserError(
                f"{args.init_from} is a model, with sizes and tokenizers: leave out "
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
    parser = options.new_parser("python -m train.kd", "Distill a teacher into an elastic model.")
    parser.add_argument(
        "--teacher",
        type=Path,
        required=True,
        metavar="MODEL",
        help="teacher: folder of convert.teacher, or model folder",
    )
    add_number(parser, "--guidance", 1.0, "guidance scale of the teacher; 1 is off")
    parser.add_argument(
        "--student-config",
        type=Path,
        metavar="FOLDER",
        help="folder with a config.json of the student's sizes (default: the stickers model's)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="sentencepiece .model file of the student (default: the tokenizers of --init-from)",
    )
    args = parser.parse_args()
    options.check(args)
    args.init_from = args.init_from and find_folder(args.init_from)
    source = stickers.from_options(args, seed=args.seed)

    mx.random.seed(args.seed)
    with announce(f"loading {args.teacher} ..."):
        teacher, autoencoder = load_teacher(find_folder(args.teacher))
        student = make_student(args, autoencoder, feature_dims=teacher.feature_dims)
    student.transformer.checkpoint_blocks(args.save_memory)
    for share in options.shares_of(args):
        student.transformer.config.width_index(share)
    tokenizers = [encoder.tokenizer for encoder in student.text_encoders]
    batches = options.make_batches(args, source, autoencoder, tokenizers=tokenizers)
    distilled = DistillationBatches(batches, teacher)
    claim_data(args.run_dir, source.settings())
    if args.init_from and latest_checkpoint(args.run_dir) is None:
        first = [distilled(k) for k in tqdm(range(8), desc="first batches", leave=False)]
        fit_to_teacher(student, teacher, first, seed=args.seed, shift=args.time_shift)
    Trainer(
        student,
        Distillation(teacher, args.guidance),
        batches=distilled,
        config=options.training_config(args),
        run_dir=args.run_dir,
        arguments=options.step_arguments(args),
        validate=options.make_previews(args, student, autoencoder),
    ).run()


if __name__ == "__main__":
    run_command(main)
