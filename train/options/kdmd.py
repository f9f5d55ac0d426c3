"""Options of `train.kdmd`."""

import argparse
import dataclasses
from pathlib import Path

from mlx_snapgen.cli.options import (
    Parser,
    add_model,
    add_model_widths,
    finite_number,
    guidance_scale,
    integer,
)
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.files import few_step_sampler
from mlx_snapgen.presets import FOUR_STEPS
from mlx_snapgen.settings import MAX_STEPS
from train.loop.config import TrainingConfig, warmup_of
from train.options.common import (
    MOST_RANK,
    NUM_PREVIEWS,
    REMOVED_OF_STICKERS,
    TEACHER_HELP,
    add_channel_weights,
    add_number,
    add_output,
    add_removed,
    add_run_dir,
    add_seed,
    add_teacher_source,
    check_alpha,
    check_at_least,
    check_at_most,
    check_channel_weights,
    check_learning_rate,
    check_new_lora,
)
from train.options.data import add_data, size_pair

BY_RESOLUTION = "resolution"
"""Value of `--time-shift` for None, see `SamplerConfig`."""


def parse() -> argparse.Namespace:
    """The command's options, checked."""
    parser = Parser(
        prog="python -m train.kdmd",
        description="Distill a model to few steps. Run again with the same --run-dir to resume.",
        renamed={"--widths": "--model-widths"},
    )
    add_model(parser)
    add_run_dir(parser)
    add_output(parser, ".safetensors file to write, the LoRA of the student")
    add_data(parser, required=False)
    add = parser.add_argument
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of prompts to train on, one per line (default: the captions of --data)",
    )
    add(
        "--sizes",
        nargs="+",
        type=size_pair,
        metavar="HxW",
        help="sizes of pictures in pixels, one for each batch at random (default: those of --data, "
        "as often as there; with --prompts-file the model's)",
    )
    add(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help="LoRA of the few-step teacher (default: none, the loss is DMD alone)",
    )
    add(
        "--teacher",
        metavar="MODEL",
        help="another teacher with the same latents and its own few-step mode: "
        f"{TEACHER_HELP} (default: --model)",
    )
    add_teacher_source(parser)
    source = "that of --few-step-lora, or else"
    add(
        "--few-steps",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help=f"denoising steps of the student (default: {source} {FOUR_STEPS.num_inference_steps})",
    )
    add(
        "--time-shift",
        type=_time_shift,
        metavar="S",
        help="shift of the noise levels, of the student's steps and of the DMD term: a number, or "
        f"{BY_RESOLUTION} for 1 at 256 pixels to 3 at 1024 (default: {source} "
        f"{FOUR_STEPS.time_shift:g})",
    )
    add(
        "--fresh-noise",
        action=argparse.BooleanOptionalAction,
        help="train and draw with new noise in each step, not with Euler steps "
        f"(default: {source} off)",
    )
    add_model_widths(parser, default=None)
    add_number(
        parser, "--steps", 2000, "iterations, at least --student-every; each trains the critic"
    )
    add_number(parser, "--student-every", 5, "train the student once every N iterations")
    add_number(parser, "--batch-size", 32, "prompts per micro-batch in each process")
    add_number(parser, "--accumulate", 1, "micro-batches per iteration in each process")
    add(
        "--guidance",
        type=guidance_scale,
        metavar="G",
        help="guidance scale of the teacher (default: the model's)",
    )
    add_channel_weights(parser)
    add_number(parser, "--rank", 64, "rank of the LoRAs")
    add_number(parser, "--alpha", 128.0, "multiply the LoRAs by alpha / rank")
    add_number(parser, "--learning-rate", 1e-4, "AdamW learning rate")
    add_number(parser, "--checkpoint-every", 500, "iterations between checkpoints")
    add(
        "--validation-prompts",
        nargs="+",
        metavar="PROMPT",
        help=f"prompts to draw after every checkpoint (default: {NUM_PREVIEWS} of the prompts)",
    )
    add(
        "--save-memory",
        action="store_true",
        help="recompute the blocks in the backward pass: half the memory, 1/3 more time "
        "(default: off)",
    )
    add_seed(parser)
    add_removed(parser, REMOVED_OF_STICKERS)
    args = parser.parse_args()
    check_new_lora(args.output)
    check_at_least(args, 1, "steps", "student_every", "batch_size", "accumulate", "rank")
    check_at_least(args, 1, "checkpoint_every")
    check_alpha(args)
    if args.steps < args.student_every:
        raise UserError(
            f"--steps {args.steps} never trains the student, whose turn is every "
            f"{args.student_every} iterations: give at least --steps {args.student_every}"
        )
    check_at_least(args, 0, "seed", "guidance")
    check_at_most(args, MOST_RANK, "rank")
    check_channel_weights(args)
    check_learning_rate(args.learning_rate)
    if args.teacher and args.few_step_lora:
        raise UserError("--teacher has its own few-step mode: leave out --few-step-lora")
    if bool(args.data) == bool(args.prompts_file):
        raise UserError("give either --data SOURCE... or --prompts-file FILE")
    return args


def _time_shift(text: str) -> float | str:
    if text == BY_RESOLUTION:
        return text
    if (shift := finite_number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"it must be above 0 or {BY_RESOLUTION}, got {text}")
    return shift


def sampler_of(args: argparse.Namespace) -> SamplerConfig:
    """The student's sampler, in training and drawing."""
    base = few_step_sampler(args.few_step_lora) if args.few_step_lora else FOUR_STEPS
    given = {
        "num_inference_steps": args.few_steps,
        "time_shift": args.time_shift,
        "fresh_noise": args.fresh_noise,
    }
    given = {k: v for k, v in given.items() if v is not None}
    if args.time_shift == BY_RESOLUTION:
        given["time_shift"] = None
    return dataclasses.replace(base, **given)


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        # It counts the student's own steps.
        warmup_steps=warmup_of(args.steps // args.student_every, 50),
        betas=(0.0, 0.99),
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
    )
