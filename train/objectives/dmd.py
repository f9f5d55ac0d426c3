"""K-DMD (SnapGen++ eqs. 9-10)."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.lora.adapters import acting, add_lora, train_only
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.teachers.base import Condition, Teacher
from train.data.source import Batch
from train.objectives.losses import (
    add_noise,
    dmd_loss,
    expand,
    features_loss,
    per_sample,
    sample_tau,
)
from train.objectives.projectors import fit_projectors, new_projectors

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
            add_lora(network, rank, alpha=alpha, targets=targets, name=name)
        train_only(network, *trained)
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
                v, features = network(x_t, sigma, text, mask, share=width, return_features=True)
            return x_t - expand(sigma, x_t) * v, v, features

        def critic_velocity(x: mx.array, t: mx.array) -> mx.array:
            with acting(network, critic):
                return network(x, t, text, mask, share=width)

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
            v_teacher = mx.stop_gradient(
                teacher.velocity(x_tau, tau, condition, guidance_scale=guidance_scale)
            )
            losses = {"dmd": dmd_loss(x0, x_tau, tau, v_critic, v_teacher)}
            if few_step:
                target, seen = map(
                    mx.stop_gradient,
                    teacher.velocity_and_features(x_t, sigma, condition, few_step=True),
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


def fit_to_few_step(model: Distilled, teacher: Teacher, batches: Sequence[Batch]) -> None:
    """Start the projectors at the least-squares fit to the few-step teacher's features."""

    def own(batch: Batch, width: float) -> mx.array:
        text, mask = (batch[name] for name in STUDENT_TEXT)
        with acting(model.network, STUDENT):
            return model.network(
                batch["x_t"], batch["sigma"], text, mask, share=width, return_features=True
            )[1]

    def seen(batch: Batch) -> mx.array:
        condition = Condition(*(batch[name] for name in Condition._fields))
        return teacher.velocity_and_features(
            batch["x_t"], batch["sigma"], condition, few_step=True
        )[1]

    fit_projectors(model.projectors, model.widths, batches, own, seen)
