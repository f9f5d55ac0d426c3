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
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.model import FEW_STEP, load_pretrained
from mlx_snapgen.config import FOUR_STEPS, WIDTH_NAMES, AutoencoderConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.adapters import LoRALinear, acting, add_lora
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.sampling import get_schedule
from mlx_snapgen.teachers.base import Condition, Teacher
from mlx_snapgen.teachers.checkpoint import CheckpointTeacher, load_teacher
from train.engine import Batch, Trainer, TrainingConfig, latest_checkpoint, load_ema
from train.losses import (
    add_noise,
    dmd_loss,
    expand,
    features_loss,
    per_sample,
    sample_tau,
)
from train.previews import Previews
from train.projectors import fit_projectors, new_projectors
from train.scenes import training_scene

TARGETS = ("*_proj", "ffn.linear*", "time.*.linear*", "long_skips.*", "*sample.linear")
STUDENT = "student"
STUDENT_TEXT = ("student_text", "student_mask")
"""In a batch, the joined text (B, L, D) and mask (B, L) that student and critic are told."""


def critic_name(width: float) -> str:
    """Name of the critic's adapter of one width."""
    return f"critic_{round(1000 * width)}"


class Distilled(nn.Module):
    """What K-DMD trains: adapters over a frozen network, and a feature projector per width."""

    def __init__(
        self,
        network: EfficientDiT,
        widths: Sequence[float],
        feature_dims: int,
        rank: int = 64,
        alpha: float = 128.0,
        targets: Sequence[str] = TARGETS,
    ):
        super().__init__()
        self.network, self.widths = network, tuple(widths)
        trained = [STUDENT, *map(critic_name, widths)]
        for name in trained:
            add_lora(network, rank, alpha, targets, name)
        network.freeze()
        for layer in network.modules():
            if isinstance(layer, LoRALinear):
                for name in trained:
                    layer.adapters[name].unfreeze()
        self.projectors = new_projectors(network.config.hidden_size, widths, feature_dims)

    def project(self, features: mx.array, width: float) -> mx.array:
        """Student features (B, N, width * d) -> the teacher's size."""
        return self.projectors[self.widths.index(width)](features)


def only(gradients: dict, *parts: str) -> list[tuple[str, mx.array]]:
    """The flat gradients whose path has one of `parts` as a component."""
    return [(k, g) for k, g in tree_flatten(gradients) if set(parts) & set(k.split("."))]


def make_gradients(
    teacher: Teacher, guidance_scale: float, few_step: bool
) -> Callable[..., tuple[dict, dict[str, mx.array]]]:
    """The gradient function for `Trainer`: (model, batch, key, width, student_turn).

    `batch` holds the student's own noisy latents `x_t` (B, H, W, C) at levels `sigma` (B,), and the
    prompts as the teacher reads them (`Condition`) and as the student does (`STUDENT_TEXT`). The
    critic's gradients come every time, the student's and the projector's on its turn; the
    optimizer leaves alone what has none.
    """

    def gradients(model: Distilled, batch: Batch, key: mx.array, width: float, student_turn: bool):
        network, x_t, sigma = model.network, batch["x_t"], batch["sigma"]
        condition = Condition(*(batch[name] for name in Condition._fields))
        text, mask = (batch[name] for name in STUDENT_TEXT)
        critic = critic_name(width)
        keys = mx.random.split(key, 4)
        params = model.trainable_parameters()

        def student() -> tuple[mx.array, mx.array, mx.array]:
            with acting(network, STUDENT):
                v, features = network(x_t, sigma, text, mask, width, return_features=True)
            return x_t - expand(sigma, x_t) * v, v, features

        def critic_velocity(x: mx.array, t: mx.array) -> mx.array:
            with acting(network, critic):
                return network(x, t, text, mask, width)

        def critic_loss(params, x0):
            model.update(params)
            tau = sample_tau(keys[0], len(x0))
            eps = mx.random.normal(x0.shape, key=keys[1])
            v = critic_velocity(add_noise(x0, eps, tau), tau)
            return per_sample(eps - x0 - v).mean()

        def student_loss(params):
            model.update(params)
            x0, v, features = student()
            tau = sample_tau(keys[2], len(x0))
            fixed = mx.stop_gradient(x0)
            x_tau = add_noise(fixed, mx.random.normal(x0.shape, key=keys[3]), tau)
            v_critic = mx.stop_gradient(critic_velocity(x_tau, tau))
            v_teacher = mx.stop_gradient(teacher.velocity(x_tau, tau, condition, guidance_scale))
            losses = {"dmd": dmd_loss(x0, x_tau, tau, v_critic, v_teacher)}
            if few_step:
                target, seen = map(
                    mx.stop_gradient, teacher.velocity_and_features(x_t, sigma, condition, True)
                )
                losses["output"] = per_sample(v - target).mean()
                projected = model.project(features, width)
                losses["features"] = features_loss(projected, seen).mean()
            return sum(losses.values()), (fixed, losses)

        if student_turn:
            (_, (x0, losses)), grads = mx.value_and_grad(student_loss)(params)
            kept = only(grads, STUDENT, *(["projectors"] if few_step else []))
        else:
            x0, losses, kept = mx.stop_gradient(student()[0]), {}, []
        value, grads = mx.value_and_grad(critic_loss)(params, x0)
        model.update(params)
        metrics = {f"{name}_{width:g}": loss for name, loss in losses.items()}
        kept += only(grads, critic)
        return tree_unflatten(kept), metrics | {f"critic_{width:g}": value}

    return gradients


class Simulation:
    """Backward simulation: batches of x_t that the student itself would meet.

    A batch picks a step of the schedule, runs the student up to it without gradient (predict x0,
    noise it afresh to the next level), and stops there. `width_of` is told the step. `read` makes
    prompts into the student's text and mask; None where the teacher is of the student's own
    weights, which reads for both.
    """

    def __init__(
        self,
        model: Distilled,
        teacher: Teacher,
        shape: tuple[int, int, int],
        batch_size: int,
        prompts: Callable[[int], str],
        width_of: Callable[[int], float],
        num_steps: int = FOUR_STEPS.num_inference_steps,
        time_shift: float = FOUR_STEPS.time_shift,
        seed: int = 0,
        read: Callable[[Sequence[str]], tuple[mx.array, mx.array]] | None = None,
    ):
        self.model, self.teacher, self.shape, self.read = model, teacher, shape, read
        self.batch_size, self.prompts, self.width_of = batch_size, prompts, width_of
        self.levels = get_schedule(num_steps, time_shift)
        self.seed = seed

        def predict(x_t, sigma, text, mask, width):
            with acting(model.network, STUDENT):
                v = model.network(x_t, sigma, text, mask, width)
            return x_t - expand(sigma, x_t) * v

        self._predict = mx.compile(predict, inputs=model.state)

    def __call__(self, number: int) -> Batch:
        """Batch `number`, from the student as it is now."""
        # The engine numbers batches by step, then process.
        step = number // mx.distributed.init().size()
        start, count = number * self.batch_size, self.batch_size
        rng = np.random.default_rng((self.seed, number, 4))
        stop, width = int(rng.integers(len(self.levels) - 1)), self.width_of(step)
        prompts = [self.prompts(start + k) for k in range(count)]
        condition = self.teacher.encode(prompts)
        text, mask = self.read(prompts) if self.read else (condition.text, condition.mask)
        keys = mx.random.split(mx.random.key(int(rng.integers(2**32))), stop + 1)
        x_t = mx.random.normal((count, *self.shape), key=keys[0])
        for i in range(stop):
            sigma, following = (mx.full((count,), s) for s in self.levels[i : i + 2])
            x0 = self._predict(x_t, sigma, text, mask, width)
            x_t = add_noise(x0, mx.random.normal(x0.shape, key=keys[i + 1]), following)
        sigma = mx.full((count,), self.levels[stop])
        told = dict(zip(STUDENT_TEXT, (text, mask), strict=True))
        return {"x_t": x_t, "sigma": sigma, **condition._asdict(), **told}


def fit_to_few_step(model: Distilled, teacher: Teacher, batches: Sequence[Batch]) -> None:
    """Start the projectors at the least-squares fit to the few-step teacher's features."""

    def own(batch: Batch, width: float) -> mx.array:
        text, mask = (batch[name] for name in STUDENT_TEXT)
        with acting(model.network, STUDENT):
            return model.network(
                batch["x_t"], batch["sigma"], text, mask, width, return_features=True
            )[1]

    def seen(batch: Batch) -> mx.array:
        condition = Condition(*(batch[name] for name in Condition._fields))
        return teacher.velocity_and_features(batch["x_t"], batch["sigma"], condition, True)[1]

    fit_projectors(model.projectors, model.widths, batches, own, seen)


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
        "--widths", nargs="+", choices=list(WIDTH_NAMES), default=list(WIDTH_NAMES), metavar="W"
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
        load_lora(args.few_step_lora, network, 0.0, FEW_STEP)
    few_step = FEW_STEP if args.few_step_lora else None
    own = CheckpointTeacher(network, components.text_encoders, few_step)
    guidance = args.guidance
    if guidance is None:
        guidance = config.sampler.guidance_scale
    teacher = own if args.teacher is None else other_teacher(args.teacher, config.autoencoder)
    widths = [WIDTH_NAMES[name] for name in args.widths]
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
        save_lora(args.output, network, STUDENT, config.name)
        print(args.output)


if __name__ == "__main__":
    run_command(main)
