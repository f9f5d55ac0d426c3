"""K-DMD: distill an elastic model to four steps: `python -m train.kdmd --model FOLDER ...`.

SnapGen++ section 3.3, eqs. 9-10. In every iteration the student samples from noise (backward
simulation), and a critic of the same width is trained to denoise the result. In every fifth
iteration the student is trained too: by the distribution-matching gradient (of critic and guided
teacher; `dmd_loss` in train/objectives/kdmd.py), and by the losses to the few-step teacher's
output and features, at the student's own x_t. Student, critics and few-step teacher are LoRAs over
one set of base weights, which is also the teacher; `--teacher` selects another teacher and its
few-step mode.

If the teacher has no few-step mode, this is DMD alone; with `--model-widths full` it trains the
few-step teacher itself. Training needs captions, but no pictures.
"""

import dataclasses

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import FEW_STEP, load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.config import FOUR_STEPS
from mlx_snapgen.errors import run_command
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.settings import check_width
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher
from train.data.prompts import PromptList
from train.data.simulation import STUDENT, Simulation
from train.data.stickers import source as stickers
from train.data.streams import Stream
from train.evaluation.previews import Previews
from train.loop.checkpoint import latest_checkpoint
from train.loop.run import claim_data, find_folder
from train.loop.trainer import Trainer
from train.objectives.kdmd import DMD, Distilled, DMDStep, fit_to_few_step, load_other_teacher
from train.options.kdmd import parse, training_config


def main() -> None:
    args = parse()
    captions = stickers.from_options(args, seed=args.seed)
    prompts = PromptList(list(read_prompts(args.prompts_file))) if args.prompts_file else captions

    mx.random.seed(args.seed)
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(args.model)
    components.config = dataclasses.replace(components.config, few_step=FOUR_STEPS)
    network, config = components.transformer, components.config
    shares = [check_width(config, name).share for name in args.model_widths]
    if args.few_step_lora:
        load_lora(args.few_step_lora, network, weight=0.0, name=FEW_STEP)
    few_step = FEW_STEP if args.few_step_lora else None
    own = CheckpointTeacher(network, components.text_encoders, few_step=few_step)
    teacher = own
    if args.teacher:
        teacher = load_other_teacher(find_folder(args.teacher), config.autoencoder)
    guidance = config.sampler.guidance_scale if args.guidance is None else args.guidance
    model = Distilled(
        network, shares, feature_dims=teacher.feature_dims, rank=args.rank, alpha=args.alpha
    )

    def share_of(step: int) -> float:
        # The same for all iterations of a student step, so that the critic of this width is up to
        # date.
        turn = step // args.student_every
        return float(Stream.CRITIC_WIDTHS.generator(args.seed, turn).choice(shares))

    h, w = (side // config.autoencoder.downsampling for side in config.image_size)
    batches = Simulation(
        network,
        teacher,
        shape=(h, w, config.transformer.latent_channels),
        batch_size=args.batch_size,
        prompts=prompts,
        share_of=share_of,
        seed=args.seed,
        read=None if teacher is own else own.read,
    )
    claim_data(args.run_dir, {"data": "prompts"} if args.prompts_file else captions.settings())
    if teacher.has_few_step and latest_checkpoint(args.run_dir) is None:
        first = [batches(k) for k in tqdm(range(8), desc="first batches", leave=False)]
        fit_to_few_step(model, teacher, first)
    trainer = Trainer(
        model,
        DMD(teacher, guidance, teacher.has_few_step),
        batches=batches,
        config=training_config(args),
        run_dir=args.run_dir,
        arguments=lambda step: DMDStep(share_of(step), (step + 1) % args.student_every == 0),
        validate=Previews(
            components, stickers.PREVIEW_PROMPTS, widths=args.model_widths, adapter=STUDENT
        ),
    )
    if trainer.run() and trainer.is_main:
        with trainer.averaged():
            save_lora(args.output, network, name=STUDENT, base_model=config.name)
        print(args.output)


if __name__ == "__main__":
    run_command(main)
