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
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.config import STICKERS, WIDTH_NAMES, ModelConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.networks.text_encoders.sentencepiece import Tokenizer
from mlx_snapgen.teachers.base import Condition, Teacher
from mlx_snapgen.teachers.checkpoint import load_teacher
from train.engine import Batch, Trainer, latest_checkpoint
from train.losses import features_loss, per_sample, timestep_aware
from train.previews import previews_of
from train.projectors import check_same_tokens, fit_projectors, new_projectors
from train.supernetwork import (
    Data,
    TextToLatents,
    add_arguments,
    elastic_gradients,
    make_data,
    noisy,
    sampled_widths,
    start_from,
    training_config,
)


class Student(TextToLatents):
    """The elastic model, and for each of its widths a projector (phi) to the teacher's features."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer], feature_dims: int):
        super().__init__(config, tokenizers)
        d, self._widths = config.transformer.hidden_size, config.transformer.widths
        self.projectors = new_projectors(d, self._widths, feature_dims)

    def project(self, features: mx.array, width: float) -> mx.array:
        """Features (B, N, width * d) -> (B, N, feature_dims)."""
        return self.projectors[self._widths.index(width)](features)


class TaughtData:
    """`Data` with what the teacher makes of the captions: the fields of `Condition`."""

    def __init__(self, data: Data, teacher: Teacher):
        self.data, self.teacher = data, teacher

    def __call__(self, number: int) -> Batch:
        """Batch `number`."""
        batch, prompts = self.data.with_prompts(number)
        return batch | self.teacher.encode(prompts)._asdict()


def lesson(
    teacher: Teacher, x_t: mx.array, t: mx.array, condition: Condition, guidance_scale: float
) -> tuple[mx.array, mx.array]:
    """The teacher's velocity, with guidance, and its features (B, N, D), both without gradient."""
    v, features = teacher.velocity_and_features(x_t, t, condition)
    if guidance_scale != 1:
        v = teacher.velocity(x_t, t, condition, guidance_scale)
    return mx.stop_gradient(v), mx.stop_gradient(features)


def make_gradients(
    teacher: Teacher, guidance_scale: float = 1.0
) -> Callable[..., tuple[dict, dict[str, mx.array]]]:
    """The gradient function for `Trainer`: (model, batch, key, widths, shift).

    `batch` is as `TaughtData` makes it, `widths` are the sampled sub-networks', `shift` is that of
    the noise levels.
    """

    def gradients(
        model: Student, batch: Batch, key: mx.array, widths: Sequence[float], shift: float
    ):
        x_t, t, v = noisy(batch["latents"], key, shift)
        condition = Condition(*(batch[name] for name in Condition._fields))
        v_teacher, seen = lesson(teacher, x_t, t, condition, guidance_scale)

        def loss(text: mx.array, mask: mx.array, width: float, full: mx.array | None):
            predicted, own = model.transformer(x_t, t, text, mask, width, return_features=True)
            projected = model.project(own, width)
            check_same_tokens(projected, seen)
            task, output = per_sample(predicted - v), per_sample(predicted - v_teacher)
            features = features_loss(projected, seen).mean()
            total = timestep_aware(task, output, t) + features
            losses = {"loss": task.mean(), "output": output.mean(), "features": features}
            if full is None:
                return total, (predicted, losses)
            losses["distillation"] = per_sample(predicted - full).mean()
            metrics = {f"{name}_{width:g}": value for name, value in losses.items()}
            return total + losses["distillation"], (predicted, metrics)

        return elastic_gradients(model, batch, widths, loss)

    return gradients


def fit_to_teacher(
    model: Student, teacher: Teacher, batches: Sequence[Batch], seed: int, shift: float
) -> None:
    """Start the projectors at the least-squares fit, over noisy latents as training has them."""
    keys = mx.random.split(mx.random.key(seed), len(batches))
    met = []
    for batch, key in zip(batches, keys, strict=True):
        x_t, t, _ = noisy(batch["latents"], key, shift)
        met.append(batch | {"x_t": x_t, "t": t})

    def own(batch: Batch, width: float) -> mx.array:
        states = []
        for i, encoder in enumerate(model.text_encoders):
            mask = batch[f"mask_{i}"]
            states.append(TextStates(encoder(batch[f"tokens_{i}"], mask), mask))
        text, mask = model.transformer.encode_text(states)
        x_t, t = batch["x_t"], batch["t"]
        return model.transformer(x_t, t, text, mask, width, return_features=True)[1]

    def seen(batch: Batch) -> mx.array:
        condition = Condition(*(batch[name] for name in Condition._fields))
        return teacher.velocity_and_features(batch["x_t"], batch["t"], condition)[1]

    fit_projectors(model.projectors, model.transformer.config.widths, met, own, seen)


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
    widths = [WIDTH_NAMES[name] for name in args.widths]
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
