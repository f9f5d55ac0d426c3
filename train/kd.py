"""Distill a teacher into an elastic model: `python -m train.kd --model MODEL --teacher ...`.

SnapGen++ section 3.3, eqs. 6-8, at every elastic width. The full network, one sampled sub-network
and the teacher get the same noisy latents. Each network learns the task's velocity (L_diff) and the
teacher's (L_out, eq. 6), weighted by the timestep-aware scaling S, and, through a projector for its
width, the teacher's last-layer features (L_feat, eq. 7):

    L = S(L_diff, L_out) + L_feat                                                            (eq. 8)

As in flow matching, the sub-network also learns from the full one (eq. 5), and the gradients of the
two are scaled to the same norm. Student and teacher each have their own text encoders; where the
student's caption is dropped, the teacher gets its unconditional text, too.

Latents are those of the student's autoencoder. If the teacher has other latents, velocities cannot
be compared: the teacher gets its own latents of the same pictures at the same noise levels, and the
loss is L_diff + L_feat. `train.prepare --teacher` encodes the pictures for both, and the captions
for the teacher.
"""

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.errors import run_command
from train.data.distillation import DistillationBatches
from train.loop.checkpoint import latest_checkpoint
from train.loop.distributed import print_once
from train.loop.roles import distillation_roles
from train.loop.run import find_folder, start_from
from train.loop.teacher import (
    check_teacher,
    check_teacher_latents,
    conditions_for,
    open_teacher,
    same_latents,
)
from train.loop.trainer import Trainer
from train.objectives.distillation import Distillation, Student, fit_to_teacher
from train.options import supernetwork as options
from train.options.common import TEACHER_HELP, add_number, add_teacher_source, check_at_least
from train.setup import supernetwork as setup
from train.setup.data import open_source


def make_student(components: Components, *, feature_dims: int) -> Student:
    """A loaded model as the student."""
    config = components.config
    student = Student(config, [None] * len(config.text_encoders), feature_dims)
    student.adopt(components)
    return student


def main() -> int:
    parser = options.new_parser("python -m train.kd", "Distill a teacher into an elastic model.")
    parser.add_argument(
        "--teacher", required=True, metavar="MODEL", help=f"teacher: {TEACHER_HELP}"
    )
    add_teacher_source(parser)
    add_number(
        parser, "--guidance", 1.0, "guidance scale of a teacher with the same latents; 1 is off"
    )
    args = parser.parse_args()
    check_at_least(args, 0, "guidance")
    folder = options.check(args)
    check_teacher(args)
    start = args.init_from and find_folder(args.init_from)
    source = open_source(args, folder.config)

    mx.random.seed(args.seed)
    teacher, autoencoder, teacher_digest = open_teacher(args)
    components = setup.load_model(args, folder, source)
    same = same_latents(components.autoencoder, autoencoder)
    if not same:
        if args.guidance != 1:
            print_once(
                f"warning: --guidance has no effect: {args.teacher} has other latents than the "
                "model, which learns only its features"
            )
        check_teacher_latents(source, autoencoder, teacher=args.teacher, model=args.model)
    student = make_student(components, feature_dims=teacher.feature_dims)
    if start:
        start_from(student, start)
    student.transformer.checkpoint_blocks(args.save_memory)
    batches = setup.make_batches(args, source, components.autoencoder, model=student)
    conditions = conditions_for(teacher, source, name=str(args.teacher))
    distilled = DistillationBatches(batches, conditions)
    weights = setup.weights_of(args, batches, components.autoencoder)
    objective = Distillation(teacher, args.guidance, same_latents=same, weights=weights)
    setup.claim_run(
        args,
        source,
        folder,
        components=components,
        trained=student,
        fixed={"teacher_digest": teacher_digest},
        options={"guidance": args.guidance},
    )
    setup.print_passes(args, source)
    if latest_checkpoint(args.run_dir) is None:
        numbers = tqdm(range(8), desc="fitting projectors", unit="batch", leave=False)
        # Each with other pictures.
        first = (distilled(batches.first_of(k)) for k in numbers)
        fit_to_teacher(student, objective, first, seed=args.seed, shift=args.time_shift)
    trainer = Trainer(
        student,
        objective,
        batches=distilled,
        config=options.training_config(args),
        run_dir=args.run_dir,
        arguments=setup.step_arguments(args, folder.config),
        validate=setup.make_validation(args, source, components.autoencoder, model=student),
        roles=distillation_roles(student.transformer.config.widths),
    )
    trainer.run()
    return trainer.exit_code


if __name__ == "__main__":
    run_command(main)
