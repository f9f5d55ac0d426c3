"""Optimizers and learning rates."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.optimizers as optim

from train.loop.config import TrainingConfig

MUON_RATE = 20
"""Muon's steps have a spectral norm of its learning rate, where Adam's have that in every entry."""


def make_optimizer(config: TrainingConfig) -> optim.Optimizer:
    """The optimizer that `config` names, with its learning-rate schedule."""
    adamw = optim.AdamW(
        learning_rate=learning_rate_schedule(config),
        betas=list(config.betas),
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
    if config.optimizer == "adamw":
        return adamw
    faster = replace(
        config,
        learning_rate=MUON_RATE * config.learning_rate,
        final_learning_rate=MUON_RATE * config.final_learning_rate,
    )
    muon = optim.Muon(learning_rate_schedule(faster), weight_decay=0.0)
    return optim.MultiOptimizer([muon, adamw], [is_hidden_matrix])


def is_hidden_matrix(path: str, weight: mx.array) -> bool:
    """Whether Muon trains a parameter: a matrix from hidden to hidden, no table or embedding."""
    inside = ("blocks.", "layers.", "long_skips.", "sample.")
    return weight.ndim == 2 and "modulation" not in path and any(p in path for p in inside)


def learning_rate_schedule(config: TrainingConfig) -> Callable[[mx.array], mx.array]:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`."""
    warmup = max(1, config.warmup_steps)
    decay = optim.cosine_decay(
        config.learning_rate, max(1, config.steps - warmup), config.final_learning_rate
    )
    rise = optim.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup)
    return optim.join_schedules([rise, decay], [warmup])
