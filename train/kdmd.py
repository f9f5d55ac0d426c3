"""K-DMD: distill an elastic model to four steps: `python -m train.kdmd --model FOLDER ...`.

SnapGen++ section 3.3, eqs. 9-10. In every iteration the student draws from noise (backward
simulation), and a critic of the same width learns to denoise the result. In every fifth, the
student moves along the distribution-matching gradient (teacher with guidance against critic) and
towards the few-step teacher's output and features, both at the student's own x_t. Student, critics
and few-step teacher are LoRAs over one set of base weights, which is also the teacher; `--teacher`
takes another teacher, with a few-step mode of its own.

Without a few-step mode this is DMD alone; with `--model-widths full` it trains the few-step teacher
itself. Captions are enough, no pictures are needed.
"""

import dataclasses
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import FEW_STEP, load_pretrained
from mlx_snapgen.cli.options import Parser, add_model, add_model_widths
from mlx_snapgen.config import FOUR_STEPS
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.settings import WIDTH_NAMES, check_width
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from train.data.prompts import PromptList, read_prompts
from train.data.simulation import Simulation
from train.data.stickers import source as stickers
from train.data.streams import Stream
from train.evaluation.previews import Previews
from train.loop.checkpoint import latest_checkpoint
from train.loop.config import TrainingConfig
from train.loop.run import claim_data, find_folder
from train.loop.trainer import Trainer
from train.objectives.dmd import (
    DMD,
    STUDENT,
    Distilled,
    DMDStep,
    fit_to_few_step,
    load_other_teacher,
)
from train.options.common import (
    add_number,
    add_output,
    add_run_dir,
    add_seed,
    check_at_least,
    check_new,
)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train.kdmd",
        description="Distill a model to four steps. Run again with the same folder to resume.",
        renamed={"--widths": "--model-widths"},
    )
    add_model(parser)
    add_run_dir(parser)
    add_output(parser, "file of the student's LoRA")
    add = parser.add_argument
    add(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help="LoRA of the few-step teacher (default: DMD alone)",
    )
    add(
        "--teacher",
        type=Path,
        metavar="MODEL",
        help="another teacher of the same latents, with its own few-step mode (default: the model)",
    )
    add_model_widths(parser, default=WIDTH_NAMES)
    add_number(parser, "--steps", 2000, "critic iterations")
    add_number(parser, "--student-every", 5, "iterations per student step")
    add_number(parser, "--batch-size", 32, "prompts per iteration")
    add(
        "--guidance",
        type=float,
        metavar="G",
        help="guidance scale of the teacher (default: the model's)",
    )
    add_number(parser, "--rank", 64, "rank of the LoRAs")
    add_number(parser, "--alpha", 128.0, "the LoRAs are scaled by alpha / rank")
    add_number(parser, "--learning-rate", 1e-4, "AdamW learning rate")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to train on, one in each line (default: captions of sticker scenes)",
    )
    add_seed(parser)
    stickers.add_options(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    check_new(args.output)
    check_at_least(args, 1, "steps", "student_every", "batch_size", "rank")
    if args.teacher and args.few_step_lora:
        raise UserError("--teacher has its own few-step mode: leave out --few-step-lora")
    captions = stickers.from_options(args, seed=args.seed)
    prompts = PromptList(read_prompts(args.prompts)) if args.prompts else captions

    mx.random.seed(args.seed)
    components = load_pretrained(args.model)
    components.config = dataclasses.replace(components.config, few_step=FOUR_STEPS)
    network, config = components.transformer, components.config
    shares = [check_width(config, name).share for name in args.model_widths]
    if args.few_step_lora:
        load_lora(args.few_step_lora, network, weight=0.0, name=FEW_STEP)
    few_step = FEW_STEP if args.few_step_lora else None
    own = CheckpointTeacher(network, components.text_encoders, few_step)
    teacher = own
    if args.teacher:
        teacher = load_other_teacher(find_folder(args.teacher), config.autoencoder)
    guidance = config.sampler.guidance_scale if args.guidance is None else args.guidance
    model = Distilled(
        network, shares, feature_dims=teacher.feature_dims, rank=args.rank, alpha=args.alpha
    )

    def share_of(step: int) -> float:
        # The same for all iterations of a student step, so that each width's critic keeps up.
        turn = step // args.student_every
        return float(Stream.CRITIC_WIDTHS.generator(args.seed, turn).choice(shares))

    h, w = (side // config.autoencoder.downsampling for side in config.image_size)
    batches = Simulation(
        model,
        teacher,
        shape=(h, w, config.transformer.latent_channels),
        batch_size=args.batch_size,
        prompts=prompts,
        share_of=share_of,
        seed=args.seed,
        read=None if teacher is own else own.read,
    )
    claim_data(args.run_dir, {"data": "prompts"} if args.prompts else captions.settings())
    if teacher.has_few_step and latest_checkpoint(args.run_dir) is None:
        first = [batches(k) for k in tqdm(range(8), desc="first batches", leave=False)]
        fit_to_few_step(model, teacher, first)
    trainer = Trainer(
        model,
        DMD(teacher, guidance, teacher.has_few_step),
        batches=batches,
        config=TrainingConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=50,
            betas=(0.0, 0.99),
            weight_decay=0.0,
            ema_decay=0.99,
            seed=args.seed,
        ),
        run_dir=args.run_dir,
        arguments=lambda step: DMDStep(share_of(step), (step + 1) % args.student_every == 0),
        validate=Previews(
            components, stickers.PREVIEW_PROMPTS, widths=args.model_widths, adapter=STUDENT
        ),
    )
    if trainer.run() and trainer.is_main:
        with trainer.averaged():
            save_lora(args.output, network, STUDENT, config.name)
        print(args.output)


if __name__ == "__main__":
    run_command(main)
