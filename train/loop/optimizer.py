"""Optimizers and learning rates."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from train.loop.config import TrainingConfig

MUON_RATE = 20
"""Factor of the learning rate: the spectral norm of Muon's steps is the learning rate, while Adam's
steps have the learning rate in every entry."""


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


@dataclass(frozen=True)
class Role:
    """Parameters with a separate optimizer and gradient clip.

    Attributes:
        owns: whether a parameter's dotted path belongs to the role.
    """

    name: str
    owns: Callable[[str], bool] = lambda path: True


class Optimizers:
    """An optimizer for each role, over the parameters of one model.

    A step without gradients for a role does not change its parameters and its optimizer's state.
    `state` is the optimizer's state if there is one role, else a dictionary of them by role.
    """

    def __init__(self, config: TrainingConfig, roles: Sequence[Role]):
        self.config, self.roles = config, tuple(roles)
        self._optimizers = {role.name: make_optimizer(config) for role in roles}

    def init(self, parameters: dict[str, Any]) -> None:
        """Make the state for the parameters."""
        for role in self.roles:
            self._optimizers[role.name].init(self._part(parameters, role))

    def update(self, model: nn.Module, gradients: dict[str, Any]) -> dict[str, mx.array]:
        """One step of all roles that have gradients; returns their norms before the clip."""
        norms = {}
        for role in self.roles:
            part = self._part(gradients, role)
            if not part:
                continue
            part, norm = optim.clip_grad_norm(part, self.config.max_grad_norm)
            self._optimizers[role.name].update(model, part)
            norms["grad_norm" if self._single else f"grad_norm_{role.name}"] = norm
        return norms

    @property
    def count(self) -> mx.array:
        """Steps so far, of the role with most of them."""
        states = [optimizer.state for optimizer in self._optimizers.values()]
        counts = [state.get("states", [state])[0]["step"].astype(mx.float32) for state in states]
        return functools.reduce(mx.maximum, counts)

    @property
    def state(self) -> dict[str, Any]:
        """The optimizers' state as a tree of arrays."""
        if self._single:
            return self._optimizers[self.roles[0].name].state
        return {name: optimizer.state for name, optimizer in self._optimizers.items()}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        states = {self.roles[0].name: state} if self._single else state
        for name, optimizer in self._optimizers.items():
            optimizer.state = states[name]

    @property
    def _single(self) -> bool:
        return len(self.roles) == 1

    def _part(self, tree: dict[str, Any], role: Role) -> dict[str, Any]:
        if self._single:
            return tree
        return dict(tree_unflatten([(k, v) for k, v in tree_flatten(tree) if role.owns(k)]))


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
