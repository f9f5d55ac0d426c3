"""K-DMD: distil an elastic model to four steps: `python -m train.kdmd --model FOLDER ...`.

SnapGen++ section 3.3, eqs. 9-10. Every iteration the student draws from noise (backward
simulation) and a critic of its width learns to denoise what it drew. Every fifth, the student
moves along the distribution-matching gradient (teacher with guidance against critic) and towards
the few-step teacher's output and features, both at the student's own x_t. Student, critics and
few-step teacher are LoRAs over one set of base weights, which is also the teacher; `--teacher`
names another one, with a few-step mode of its own.

Without a few-step mode this is DMD alone. Run so at `--widths full`, it makes the few-step
teacher itself. No pictures are needed: captions are enough.
"""

import argparse
import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.model import FEW_STEP, load_pretrained
from mlx_snapgen.config import FOUR_STEPS, AutoencoderConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.settings import WIDTH_NAMES, parse_width
from mlx_snapgen.teachers.base import Teacher
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher, load_teacher
from train.data.simulation import Simulation
from train.data.stickers.scenes import training_scene
from train.evaluation.previews import Previews
from train.loop.checkpoint import latest_checkpoint, load_ema
from train.loop.config import TrainingConfig
from train.loop.trainer import Trainer
from train.objectives.dmd import STUDENT, Distilled, fit_to_few_step, make_gradients


def other_teacher(folder: Path, latents: AutoencoderConfig) -> Teacher:
    """The teacher in `folder`; `UserError` when it knows other latents than the student."""
    teacher, autoencoder = load_teacher(folder)
    theirs = autoencoder.config
    if (theirs.kind, theirs.latent_channels) != (latents.kind, latents.latent_channels):
        raise UserError(
            f"the teacher knows the latents of {theirs.kind} ({theirs.latent_channels} channels), "
            f"the student those of {latents.kind} ({latents.latent_channels}): distil the student "
            "with train.kd from this teacher first"
        )
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.kdmd",
        description="Distil a model to four steps. Run again with the same folder to resume.",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--output", type=Path, required=True, help="the student's LoRA to write")
    parser.add_argument(
        "--few-step-lora", type=Path, help="few-step teacher; without it, DMD alone"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        help="folder of another teacher of the same latents, with its own few-step mode",
    )
    parser.add_argument(
        "--widths", nargs="+", choices=WIDTH_NAMES, default=WIDTH_NAMES, metavar="W"
    )
    parser.add_argument("--steps", type=int, default=2000, help="critic iterations")
    parser.add_argument("--student-every", type=int, default=5, help="iterations per student step")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--guidance", type=float, help="of the teacher (default: what the model draws with)"
    )
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=128.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--num-nouns", type=int, help="caption the first N nouns only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        raise UserError(f"{args.output} exists already: choose another name or delete it")
    if args.teacher and args.few_step_lora:
        raise UserError("--teacher brings its own few-step mode: leave out --few-step-lora")

    mx.random.seed(args.seed)
    components = load_pretrained(args.model)
    components.config = dataclasses.replace(components.config, few_step=FOUR_STEPS)
    network, config = components.transformer, components.config
    if args.few_step_lora:
        load_lora(args.few_step_lora, network, weight=0.0, name=FEW_STEP)
    few_step = FEW_STEP if args.few_step_lora else None
    own = CheckpointTeacher(network, components.text_encoders, few_step=few_step)
    guidance = args.guidance
    if guidance is None:
        guidance = config.sampler.guidance_scale
    teacher = own if args.teacher is None else other_teacher(args.teacher, config.autoencoder)
    widths = [parse_width(name).share for name in args.widths]
    for width in widths:
        config.transformer.width_index(width)
    model = Distilled(network, widths, teacher.feature_dims, args.rank, args.alpha)

    def width_of(step: int) -> float:
        # Held while the critic takes its iterations, so that each width's critic keeps up.
        turn = step // args.student_every
        return float(np.random.default_rng((args.seed, turn, 5)).choice(widths))

    h, w = (side // components.autoencoder.config.downsampling for side in config.image_size)
    batches = Simulation(
        model,
        teacher,
        (h, w, config.transformer.latent_channels),
        args.batch_size,
        lambda k: training_scene(args.seed, k, args.num_nouns).caption,
        width_of,
        seed=args.seed,
        read=None if teacher is own else own.read,
    )
    if teacher.has_few_step and latest_checkpoint(args.run_dir) is None:
        fit_to_few_step(model, teacher, [batches(k) for k in range(8)])
    training = TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=50,
        betas=(0.0, 0.99),
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
    )
    trainer = Trainer(
        model,
        make_gradients(teacher, guidance, teacher.has_few_step),
        batches,
        training,
        args.run_dir,
        static=lambda step: (width_of(step), (step + 1) % args.student_every == 0),
        validate=Previews(components, args.widths, adapter=STUDENT),
    )
    if trainer.run() and trainer.is_main:
        model.update(tree_unflatten(list(load_ema(args.run_dir).items())))
        save_lora(args.output, network, name=STUDENT, base_model=config.name)
        print(args.output)


if __name__ == "__main__":
    run_command(main)
