"""K-DMD: distill an elastic model to few steps: `python -m train.kdmd --model MODEL ...`.

SnapGen++ section 3.3, eqs. 9-10. In every iteration the student draws from noise up to one of its
steps (backward simulation), and a critic of the same width is trained to denoise the result. In
every fifth iteration the student is trained too: by the distribution-matching gradient (of critic
and guided teacher; `dmd_loss` in train/objectives/kdmd.py), and by the losses to the few-step
teacher's output and features, at the student's own x_t. Student, critics and few-step teacher are
LoRAs over one set of base weights, which is also the teacher; `--teacher` selects another teacher
and its few-step mode. The student's noise levels, and whether its steps add fresh noise, are
written into the LoRA, and a model with this LoRA draws in the same way.

If the teacher has no few-step mode, this is DMD alone; with `--model-widths full` it trains the
few-step teacher itself. Training needs captions (`--data` or `--prompts-file`), but no pictures.
"""

import argparse
import dataclasses
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import (
    FEW_STEP,
    Components,
    check_few_step_width,
    load_pretrained,
    warn_untrained,
)
from mlx_snapgen.checkpoint.runs import OPTIONS
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.config import SamplerConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import expanded
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.settings import FULL
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from train.data.conditions import Conditions
from train.data.simulation import STUDENT, Simulation
from train.data.source import MAY_CHANGE
from train.evaluation.previews import Previews
from train.loop.checkpoint import latest_checkpoint
from train.loop.distributed import print_once
from train.loop.roles import kdmd_roles
from train.loop.run import check_same, check_sizes, claim, digest_model, digest_path
from train.loop.teacher import (
    check_teacher,
    conditions_for,
    open_teacher,
    same_latents,
)
from train.loop.trainer import Trainer
from train.objectives.kdmd import DMD, Distilled, DMDStep, fit_to_few_step
from train.objectives.losses import MEASURED, channel_weights
from train.options.common import validation_batch, widths_of
from train.options.kdmd import parse, sampler_of, training_config
from train.setup.data import preview_prompts
from train.setup.kdmd import Prompts, open_prompts, share_of

WIDTHS, RANK = "model_widths", "lora_rank"
"""In the record of a run."""


def load_model(args: argparse.Namespace, folder: ModelFolder, sampler: SamplerConfig) -> Components:
    """The model with the student's sampler, and with the few-step LoRA, of weight 0."""
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(folder)
    components.config = dataclasses.replace(components.config, few_step=sampler)
    network = components.transformer
    warn_untrained(network, args.model, result="the student learns noise from it")
    if args.few_step_lora:
        load_lora(args.few_step_lora, network, weight=0.0, name=FEW_STEP)
        # The teacher is the full network.
        if note := check_few_step_width(components, FULL.name, model=str(args.few_step_lora)):
            print_once(f"warning: {note}: train it with --model-widths {FULL.name}")
    return components


def claim_run(
    args: argparse.Namespace,
    prompts: Prompts,
    sampler: SamplerConfig,
    *,
    weights: dict[str, Any],
    networks: dict[str, Any],
    guidance: float,
) -> None:
    """Record the run, with hashes of the weights, which must stay, and options that may change."""
    lora = args.few_step_lora
    weights["few_step_digest"] = digest_path(expanded(lora)) if lora else None
    newer = {"few_step": to_dict(sampler), **weights, **prompts.newer}
    used = {
        "guidance": guidance,
        "alpha": args.alpha,
        "student_every": args.student_every,
        "channel_weights": args.channel_weights,
        **networks,
        "sizes": args.sizes and [list(size) for size in args.sizes],
    }
    claim(
        args.run_dir,
        prompts.settings | newer | {OPTIONS: used},
        steps=args.steps,
        may_change=(*MAY_CHANGE, OPTIONS),
        newer=newer,
        unrecorded={"data": "stickers"},
    )


def main() -> int:
    args = parse()
    folder, sampler = ModelFolder.open(args.model), sampler_of(args)
    widths = widths_of(args, folder.config)
    shares = [width.share for width in widths]
    check_teacher(args)
    networks = {WIDTHS: [width.name for width in widths], RANK: args.rank}
    check_same(args.run_dir, networks)
    prompts = open_prompts(args, folder.config)

    mx.random.seed(args.seed)
    components = load_model(args, folder, sampler)
    network, config = components.transformer, components.config
    own = CheckpointTeacher(
        network,
        components.text_encoders,
        few_step=FEW_STEP if args.few_step_lora else None,
        unconditional=config.unconditional_prompt,
    )
    teacher = own
    weights: dict[str, Any] = {"model_digest": digest_model(folder)}
    if args.teacher:
        teacher, autoencoder, weights["teacher_digest"] = open_teacher(args)
        if not same_latents(components.autoencoder, autoencoder):
            raise UserError(
                f"{args.teacher} has other latents than {args.model}: distill the model with "
                "train.kd from this teacher first"
            )
    guidance = config.sampler.guidance_scale if args.guidance is None else args.guidance
    model = Distilled(
        network, shares, feature_dims=teacher.feature_dims, rank=args.rank, alpha=args.alpha
    )
    network.checkpoint_blocks(args.save_memory)
    share = share_of(args, shares)
    batches = Simulation(
        network,
        config,
        teacher=conditions_for(teacher, prompts.data, name=str(args.teacher or args.model)),
        batch_size=args.batch_size,
        prompts=prompts.batches,
        share_of=share,
        accumulate=args.accumulate,
        seed=args.seed,
        student=None if teacher is own else Conditions(own),
    )
    check_sizes(args.run_dir, model)
    claim_run(args, prompts, sampler, weights=weights, networks=networks, guidance=guidance)
    if teacher.has_few_step and latest_checkpoint(args.run_dir) is None:
        numbers = tqdm(range(8), desc="fitting projectors", unit="batch", leave=False)
        fit_to_few_step(model, teacher, (batches(k) for k in numbers))
    channels = weights_of(args, components)
    trainer = Trainer(
        model,
        DMD(teacher, guidance, teacher.has_few_step, sampler.time_shift, channels),
        batches=batches,
        config=training_config(args),
        run_dir=args.run_dir,
        arguments=lambda step: DMDStep(share(step), (step + 1) % args.student_every == 0),
        validate=Previews(
            dataclasses.replace(
                components, config=dataclasses.replace(config, image_size=prompts.size)
            ),
            preview_prompts(args, prompts.source),
            widths=[width.name for width in widths],
            adapter=STUDENT,
            batch_size=validation_batch(args),
        ),
        roles=kdmd_roles(shares),
    )
    if trainer.run() and trainer.is_main:
        with trainer.averaged(), announce(f"writing {args.output} ..."):
            save_lora(
                args.output,
                network,
                name=STUDENT,
                base_model=config.name,
                few_step=sampler,
                widths=[width.name for width in widths],
            )
        print(args.output)
    return trainer.exit_code


def weights_of(args: argparse.Namespace, components: Components) -> mx.array | None:
    """`channel_weights` for --channel-weights, measured on noise: there are no pictures.

    It has the mean and variance of latents, and about their weights.
    """
    if not args.channel_weights:
        return None
    config = components.config
    height, width = (side // config.autoencoder.downsampling for side in config.image_size)
    shape = MEASURED, height, width, config.transformer.latent_channels
    noise = mx.random.normal(shape, key=mx.random.key(args.seed))
    with announce("measuring the channels of the latents ..."):
        return channel_weights(components.autoencoder, noise, power=args.channel_weights)


if __name__ == "__main__":
    run_command(main)
