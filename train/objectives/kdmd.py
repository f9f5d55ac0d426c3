"""K-DMD: the losses of student and critic in one step (SnapGen++ eqs. 9-10)."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.lora.adapters import (
    active_adapters,
    add_lora,
    linear_layers,
    set_lora_weights,
    train_only,
)
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.sampling import add_noise, shift_time
from mlx_snapgen.teachers.base import Teacher
from train.data.simulation import STUDENT, STUDENT_TEXT
from train.data.source import Batch
from train.objectives.base import Metrics, value_and_grad
from train.objectives.distillation import condition_of, features_loss
from train.objectives.elastic import latents_shift
from train.objectives.losses import expand, per_sample
from train.objectives.projectors import fit_projectors, new_projectors, only_projectors

TARGETS = ("*_proj", "ffn.linear*", "time.*.linear*", "long_skips.*", "*sample.linear")
"""Layers with adapters; a network with few blocks has no long skips."""


def critic_name(share: float) -> str:
    """Name of the critic's adapter of one width."""
    return f"critic_{round(1000 * share)}"


class Distilled(nn.Module):
    """The model that K-DMD trains: adapters over a frozen network, and a projector per width."""

    def __init__(
        self,
        network: EfficientDiT,
        shares: Sequence[float],
        *,
        feature_dims: int,
        rank: int = 64,
        alpha: float = 128.0,
    ):
        super().__init__()
        self.network, self.shares = network, tuple(shares)
        layers = [f".{path}" for path in linear_layers(network)]
        targets = [t for t in TARGETS if any(fnmatchcase(layer, f"*.{t}") for layer in layers)]
        trained = [STUDENT, *map(critic_name, shares)]
        for name in trained:
            add_lora(network, rank, alpha=alpha, targets=targets, name=name)
        train_only(network, *trained)
        # On only where they are named: drawing with the student is drawing without the critics.
        set_lora_weights(network, dict.fromkeys(trained, 0.0))
        d = network.config.hidden_size
        self.projectors = new_projectors(d, shares, feature_dims=feature_dims)

    def project(self, features: mx.array, share: float) -> mx.array:
        """Student features (B, N, share * d) -> the teacher's size."""
        return self.projectors[self.shares.index(share)](features)


def only(gradients: dict, *parts: str) -> list[tuple[str, mx.array]]:
    """The flat gradients whose path has one of `parts` as a component."""
    return [(k, g) for k, g in flat_parameters(gradients).items() if set(parts) & set(k.split("."))]


class DMDStep(NamedTuple):
    """Arguments of a step of K-DMD."""

    share: float
    """Of the network's width, for student and critic."""
    student_turn: bool
    """Whether this step also trains the student."""


@dataclass(frozen=True)
class DMD:
    """DMD, and the losses to the few-step teacher's output and features. An `Objective`.

    The DMD gradient and its sign are in `dmd_loss`. A batch has the
    student's own noisy latents `x_t` (B, H, W, C) at levels `sigma` (B,), the prompts as the
    teacher encodes them (`Condition`) and as the student does (`STUDENT_TEXT`). In every step
    the critic of its width has gradients, on the student's turn the student and, with the few-step
    teacher, the projector of that width.

    Attributes:
        guidance_scale: of the teacher.
        few_step: whether the student also learns from the teacher's few-step mode.
        shift: time shift of the noise levels tau, where critic and teacher are compared: that of
            the student's sampler; None: by the resolution of the batch.
        weights: of the latents' channels, see `channel_weights`; None: all alike.
    """

    teacher: Teacher
    guidance_scale: float
    few_step: bool
    shift: float | None = 3.0
    weights: mx.array | None = None

    def gradients(
        self, model: Distilled, batch: Batch, key: mx.array, step: DMDStep
    ) -> tuple[dict[str, Any], Metrics]:
        """See `Objective`."""
        network, teacher, share = model.network, self.teacher, step.share
        x_t, sigma = batch["x_t"], batch["sigma"]
        shift = self.shift
        if shift is None:
            shift = latents_shift(x_t, patch_size=network.config.patch_size)
        condition = condition_of(batch)
        text, mask = (batch[name] for name in STUDENT_TEXT)
        critic = critic_name(share)
        keys = mx.random.split(key, 4)

        def student() -> tuple[mx.array, mx.array, mx.array]:
            with active_adapters(network, STUDENT):
                v, features = network(x_t, sigma, text, mask, share=share, return_features=True)
            return x_t - expand(sigma, x_t) * v, v, features

        def noised(x0: mx.array, tau: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
            eps = mx.random.normal(x0.shape, key=key)
            return add_noise(x0, eps, expand(tau, x0)), eps

        def critic_velocity(x: mx.array, t: mx.array) -> mx.array:
            with active_adapters(network, critic):
                return network(x, t, text, mask, share=share)

        def critic_loss() -> tuple[mx.array, None]:
            tau = sample_tau(keys[0], len(x0), shift=shift)
            x_tau, eps = noised(x0, tau, keys[1])
            error = eps - x0 - critic_velocity(x_tau, tau)
            return per_sample(error, self.weights).mean(), None

        def student_loss() -> tuple[mx.array, tuple[mx.array, Metrics]]:
            x0, v, features = student()
            tau = sample_tau(keys[2], len(x0), shift=shift)
            fixed = mx.stop_gradient(x0)
            x_tau, _ = noised(fixed, tau, keys[3])
            v_critic = mx.stop_gradient(critic_velocity(x_tau, tau))
            v_teacher = mx.stop_gradient(
                teacher.velocity(x_tau, tau, condition, guidance_scale=self.guidance_scale)
            )
            dmd = dmd_loss(
                x0,
                x_tau,
                tau=tau,
                v_critic=v_critic,
                v_teacher=v_teacher,
                weights=self.weights,
            )
            losses = {"dmd": dmd}
            if self.few_step:
                target, teacher_features = map(
                    mx.stop_gradient,
                    teacher.velocity_and_features(x_t, sigma, condition, few_step=True),
                )
                losses["output"] = per_sample(v - target, self.weights).mean()
                projected = model.project(features, share)
                losses["features"] = features_loss(projected, teacher_features).mean()
            return functools.reduce(mx.add, losses.values()), (fixed, losses)

        kept: list[tuple[str, mx.array]] = []
        losses: Metrics = {}
        # Checkpointed blocks run again in the backward pass, with the adapters that are on then.
        if step.student_turn:
            with active_adapters(network, STUDENT):
                (_, (x0, losses)), grads = value_and_grad(model, student_loss)
            kept = only(grads, STUDENT)
            if self.few_step:
                kept += only_projectors(grads["projectors"], [model.shares.index(share)])
        else:
            x0 = mx.stop_gradient(student()[0])
        with active_adapters(network, critic):
            (value, _), grads = value_and_grad(model, critic_loss)
        metrics = {f"{name}_{share:g}": loss for name, loss in losses.items()}
        kept += only(grads, critic)
        return dict(tree_unflatten(kept)), metrics | {f"critic_{share:g}": value}


def fit_to_few_step(model: Distilled, teacher: Teacher, batches: Iterable[Batch]) -> None:
    """Initialize the projectors by least squares to the few-step teacher's features."""

    def student_features(batch: Batch, share: float) -> mx.array:
        text, mask = (batch[name] for name in STUDENT_TEXT)
        with active_adapters(model.network, STUDENT):
            return model.network(
                batch["x_t"], batch["sigma"], text, mask, share=share, return_features=True
            )[1]

    def teacher_features(batch: Batch) -> mx.array:
        condition = condition_of(batch)
        return teacher.velocity_and_features(
            batch["x_t"], batch["sigma"], condition, few_step=True
        )[1]

    fit_projectors(
        model.projectors,
        model.shares,
        batches=batches,
        student=student_features,
        teacher=teacher_features,
    )


def sample_tau(key: mx.array, count: int, *, shift: float = 3.0) -> mx.array:
    """Noise levels for the DMD term: uniform, shifted, kept off the ends of the path."""
    return mx.clip(shift_time(mx.random.uniform(shape=(count,), key=key), shift), 0.02, 0.98)


def dmd_loss(
    x0: mx.array,
    x_tau: mx.array,
    *,
    tau: mx.array,
    v_critic: mx.array,
    v_teacher: mx.array,
    weights: mx.array | None = None,
) -> mx.array:
    """A loss whose gradient is the DMD term of eq. 9 (normalized as in DMD2).

    The direction is x0_critic - x0_teacher = tau (v_teacher - v_critic): with velocities the sign
    is opposite to that of eq. 9. It is divided by the mean of |x0 - x0_teacher| of its
    sample.

    Args:
        x0: the student's clean estimate (B, ...), which carries the gradient.
        x_tau: x0 noised to `tau`.
        v_critic, v_teacher: velocities at (x_tau, tau), the teacher's with guidance.
        weights: of the channels (C,), the last axis of x0; None: all alike.
    """
    s = expand(tau, x0)
    x0_critic, x0_teacher = x_tau - s * v_critic, x_tau - s * v_teacher
    axes = tuple(range(1, x0.ndim))
    scale = mx.abs(x0 - x0_teacher).mean(axis=axes, keepdims=True)
    direction = (x0_critic - x0_teacher) / scale
    direction = mx.where(mx.isfinite(direction), direction, 0)
    target = mx.stop_gradient(x0 - direction)
    return 0.5 * per_sample(x0 - target, weights).mean()
