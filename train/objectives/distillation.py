"""Knowledge distillation from a teacher (SnapGen++ eqs. 6-8)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_snapgen.config import ModelConfig
from mlx_snapgen.networks.text_encoders.base import Tokenizer
from mlx_snapgen.sampling import add_noise
from mlx_snapgen.teachers.base import Condition, Teacher
from train.data.source import Batch
from train.objectives.base import Metrics
from train.objectives.elastic import (
    ElasticStep,
    TextToLatents,
    elastic_gradients,
    noisy,
    text_states,
)
from train.objectives.losses import expand, per_sample
from train.objectives.projectors import (
    check_same_tokens,
    fit_projectors,
    new_projectors,
    only_projectors,
)


class Student(TextToLatents):
    """The elastic model, with a projector (phi) to the teacher's features for each width."""

    def __init__(
        self, config: ModelConfig, tokenizers: Sequence[Tokenizer | None], feature_dims: int
    ):
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
    v, features = teacher.velocity_and_features(x_t, t, condition, guidance_scale=guidance_scale)
    return mx.stop_gradient(v), mx.stop_gradient(features)


@dataclass(frozen=True)
class Distillation:
    """Eqs. 6-8 and the elastic losses. An `Objective` for batches of `DistillationBatches`.

    Attributes:
        same_latents: whether the teacher has the student's latents. If not, a batch has the
            teacher's own of the same pictures, `teacher_latents`, which get the same noise levels.
            Velocities of different latents cannot be compared, so that L_out is left out.
        weights: of the latents' channels, see `channel_weights`; None: all alike.
    """

    teacher: Teacher
    guidance_scale: float = 1.0
    same_latents: bool = True
    weights: mx.array | None = None

    def gradients(
        self, model: Student, batch: Batch, key: mx.array, step: ElasticStep
    ) -> tuple[dict[str, Any], Metrics]:
        """See `Objective`."""
        patch = model.transformer.config.patch_size
        x_t, t, v = noisy(
            batch["latents"], key, shift=step.shift, patch_size=patch, early=step.early
        )
        x_teacher = x_t if self.same_latents else for_teacher(batch, t, key)
        v_teacher, teacher_features = teacher_targets(
            self.teacher,
            x_teacher,
            t=t,
            condition=condition_of(batch),
            guidance_scale=self.guidance_scale if self.same_latents else 1.0,
        )

        def loss(text: mx.array, mask: mx.array, share: float, full: mx.array | None):
            predicted, student_features = model.transformer(
                x_t, t, text, mask, share=share, return_features=True
            )
            projected = model.project(student_features, share)
            check_same_tokens(projected, teacher_features)
            task = per_sample(predicted - v, self.weights)
            features = features_loss(projected, teacher_features).mean()
            losses = {"loss": task.mean(), "features": features}
            if self.same_latents:
                output = per_sample(predicted - v_teacher, self.weights)
                losses["output"] = output.mean()
                total = timestep_aware(task, output, t=t) + features
            else:
                total = task.mean() + features
            if full is None:
                return total, (predicted, losses)
            losses["distillation"] = per_sample(predicted - full, self.weights).mean()
            metrics = {f"{name}_{share:g}": value for name, value in losses.items()}
            return total + losses["distillation"], (predicted, metrics)

        grads, metrics = elastic_gradients(model, batch, shares=step.shares, loss=loss)
        widths = model.transformer.config.widths
        trained = [widths.index(share) for share in (1.0, *step.shares)]
        projectors = tree_unflatten(only_projectors(grads["projectors"], trained))
        return grads | dict(projectors), metrics


def for_teacher(batch: Batch, t: mx.array, key: mx.array) -> mx.array:
    """The teacher's latents of a batch, with noise of their own, at levels t."""
    latents = batch["teacher_latents"]
    # `noisy` uses both halves of the key.
    own = mx.random.split(mx.random.split(key)[1])[0]
    eps = mx.random.normal(latents.shape, key=own)
    return add_noise(latents, eps, expand(t, latents))


def condition_of(batch: Batch) -> Condition:
    """The teacher's encoded prompts in a batch."""
    return Condition(*(batch[name] for name in Condition._fields))


def fit_to_teacher(
    model: Student,
    objective: Distillation,
    batches: Iterable[Batch],
    *,
    seed: int,
    shift: float | None,
) -> None:
    """Initialize the projectors by least squares, over noisy latents like those of training."""
    teacher = objective.teacher

    def noised() -> Iterator[Batch]:
        key = mx.random.key(seed)
        for batch in batches:
            key, now = mx.random.split(key)
            patch = model.transformer.config.patch_size
            x_t, t, _ = noisy(batch["latents"], now, shift=shift, patch_size=patch)
            theirs = x_t if objective.same_latents else for_teacher(batch, t, now)
            yield batch | {"x_t": x_t, "x_teacher": theirs, "t": t}

    def student_features(batch: Batch, share: float) -> mx.array:
        text, mask = model.transformer.encode_text(text_states(model, batch))
        x_t, t = batch["x_t"], batch["t"]
        return model.transformer(x_t, t, text, mask, share=share, return_features=True)[1]

    def teacher_features(batch: Batch) -> mx.array:
        condition = condition_of(batch)
        return teacher.velocity_and_features(batch["x_teacher"], batch["t"], condition)[1]

    fit_projectors(
        model.projectors,
        model.transformer.config.widths,
        batches=noised(),
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
