"""Knowledge distillation (SnapGen++ eqs. 6-8)."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_snapgen.config import ModelConfig
from mlx_snapgen.networks.text_encoders.base import TextStates, Tokenizer
from mlx_snapgen.teachers.base import Condition, Teacher
from train.data.source import Batch
from train.objectives.elastic import TextToLatents, elastic_gradients, noisy
from train.objectives.losses import features_loss, per_sample, timestep_aware
from train.objectives.projectors import check_same_tokens, fit_projectors, new_projectors


class Student(TextToLatents):
    """The elastic model, and for each of its widths a projector (phi) to the teacher's features."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer], feature_dims: int):
        super().__init__(config, tokenizers)
        d, self._widths = config.transformer.hidden_size, config.transformer.widths
        self.projectors = new_projectors(d, self._widths, feature_dims)

    def project(self, features: mx.array, width: float) -> mx.array:
        """Features (B, N, width * d) -> (B, N, feature_dims)."""
        return self.projectors[self._widths.index(width)](features)


def lesson(
    teacher: Teacher, x_t: mx.array, t: mx.array, condition: Condition, guidance_scale: float
) -> tuple[mx.array, mx.array]:
    """The teacher's velocity, with guidance, and its features (B, N, D), both without gradient."""
    v, features = teacher.velocity_and_features(x_t, t, condition)
    if guidance_scale != 1:
        v = teacher.velocity(x_t, t, condition, guidance_scale=guidance_scale)
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
            predicted, own = model.transformer(
                x_t, t, text, mask, share=width, return_features=True
            )
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
        return model.transformer(x_t, t, text, mask, share=width, return_features=True)[1]

    def seen(batch: Batch) -> mx.array:
        condition = Condition(*(batch[name] for name in Condition._fields))
        return teacher.velocity_and_features(batch["x_t"], batch["t"], condition)[1]

    fit_projectors(model.projectors, model.transformer.config.widths, met, own, seen)
