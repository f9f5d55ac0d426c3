"""Knowledge distillation from a teacher (SnapGen++ eqs. 6-8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_snapgen.config import ModelConfig
from mlx_snapgen.networks.text_encoders.base import TextStates, Tokenizer
from mlx_snapgen.teachers.base import Condition, Teacher
from train.data.source import Batch
from train.objectives.base import Metrics
from train.objectives.elastic import ElasticStep, TextToLatents, elastic_gradients, noisy
from train.objectives.losses import per_sample
from train.objectives.projectors import check_same_tokens, fit_projectors, new_projectors


class Student(TextToLatents):
    """The elastic model, with a projector (phi) to the teacher's features for each width."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer], feature_dims: int):
        super().__init__(config, tokenizers)
        d, self._shares = config.transformer.hidden_size, config.transformer.widths
        self.projectors = new_projectors(d, self._shares, feature_dims=feature_dims)

    def project(self, features: mx.array, share: float) -> mx.array:
        """Features (B, N, share * d) -> (B, N, feature_dims)."""
        return self.projectors[self._shares.index(share)](features)


def teacher_targets(
    teacher: Teacher,
    x_t: mx.array,
    *,
    t: mx.array,
    condition: Condition,
    guidance_scale: float,
) -> tuple[mx.array, mx.array]:
    """The teacher's guided velocity and its features (B, N, D), both without gradient."""
    v, features = teacher.velocity_and_features(x_t, t, condition)
    if guidance_scale != 1:
        v = teacher.velocity(x_t, t, condition, guidance_scale=guidance_scale)
    return mx.stop_gradient(v), mx.stop_gradient(features)


@dataclass(frozen=True)
class Distillation:
    """Eqs. 6-8 and the elastic losses. An `Objective` for batches of `DistillationBatches`."""

    teacher: Teacher
    guidance_scale: float = 1.0

    def gradients(
        self, model: Student, batch: Batch, key: mx.array, step: ElasticStep
    ) -> tuple[dict[str, Any], Metrics]:
        """See `Objective`."""
        x_t, t, v = noisy(batch["latents"], key, shift=step.shift)
        condition = condition_of(batch)
        v_teacher, teacher_features = teacher_targets(
            self.teacher, x_t, t=t, condition=condition, guidance_scale=self.guidance_scale
        )

        def loss(text: mx.array, mask: mx.array, share: float, full: mx.array | None):
            predicted, student_features = model.transformer(
                x_t, t, text, mask, share=share, return_features=True
            )
            projected = model.project(student_features, share)
            check_same_tokens(projected, teacher_features)
            task, output = per_sample(predicted - v), per_sample(predicted - v_teacher)
            features = features_loss(projected, teacher_features).mean()
            total = timestep_aware(task, output, t=t) + features
            losses = {"loss": task.mean(), "output": output.mean(), "features": features}
            if full is None:
                return total, (predicted, losses)
            losses["distillation"] = per_sample(predicted - full).mean()
            metrics = {f"{name}_{share:g}": value for name, value in losses.items()}
            return total + losses["distillation"], (predicted, metrics)

        return elastic_gradients(model, batch, shares=step.shares, loss=loss)


def condition_of(batch: Batch) -> Condition:
    """The teacher's encoded prompts in a batch."""
    return Condition(*(batch[name] for name in Condition._fields))


def fit_to_teacher(
    model: Student, teacher: Teacher, batches: Sequence[Batch], *, seed: int, shift: float
) -> None:
    """Initialize the projectors by least squares, over noisy latents like those of training."""
    keys = mx.random.split(mx.random.key(seed), len(batches))
    met = []
    for batch, key in zip(batches, keys, strict=True):
        x_t, t, _ = noisy(batch["latents"], key, shift=shift)
        met.append(batch | {"x_t": x_t, "t": t})

    def student_features(batch: Batch, share: float) -> mx.array:
        states = []
        for i, encoder in enumerate(model.text_encoders):
            mask = batch[f"mask_{i}"]
            states.append(TextStates(encoder(batch[f"tokens_{i}"], mask), mask))
        text, mask = model.transformer.encode_text(states)
        x_t, t = batch["x_t"], batch["t"]
        return model.transformer(x_t, t, text, mask, share=share, return_features=True)[1]

    def teacher_features(batch: Batch) -> mx.array:
        return teacher.velocity_and_features(batch["x_t"], batch["t"], condition_of(batch))[1]

    fit_projectors(
        model.projectors,
        model.transformer.config.widths,
        batches=met,
        student=student_features,
        teacher=teacher_features,
    )


def logit_normal_density(t: mx.array) -> mx.array:
    """Density of sigmoid(N(0, 1)) at t, divided by its largest value: 1 at .5, 0 at the ends."""
    t = mx.clip(t, 1e-4, 1 - 1e-4)
    logit = mx.log(t / (1 - t))
    # 1 / (t (1 - t)) makes up for the change of variable; the maximum, at t = .5, is 4.
    return mx.exp(-0.5 * logit.square()) / (4 * t * (1 - t))


def timestep_aware(task: mx.array, distillation: mx.array, *, t: mx.array) -> mx.array:
    """S(L_task, L_kd), eq. 8: the task dominates in the middle of the path, the teacher at its
    ends.

    Args:
        task, distillation: losses per sample (B,).

    Returns:
        The mean over samples of a L_task + (1 - a) (|L_task| / |L_kd|) L_kd, a from
        `logit_normal_density`; the ratio carries no gradient.
    """
    a = logit_normal_density(t)
    ratio = mx.stop_gradient(mx.abs(task) / mx.maximum(mx.abs(distillation), 1e-12))
    return (a * task + (1 - a) * ratio * distillation).mean()


def features_loss(features: mx.array, teacher: mx.array) -> mx.array:
    """L_feat (eq. 7) per sample, in units of the teacher features' own variance.

    Args:
        features: projected student features (B, N, D).
        teacher: the teacher's last-layer features (B, N, D).
    """
    return per_sample(features - teacher) / mx.maximum(mx.var(teacher), 1e-6)
