"""Optimizers and learning rates."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from train.loop.config import TrainingConfig

MUON_RATE = 20
"""Factor of the learning rate: the spectral norm of Muon's steps is the learning rate, while Adam's
steps have the learning rate in every entry."""


def make_optimizer(config: TrainingConfig) -> optim.Optimizer:
    """The optimizer that `config` names; `set_learning_rate` before each step."""
    adamw = optim.AdamW(
        learning_rate=config.learning_rate,
        betas=list(config.betas),
        weight_decay=config.weight_decay,
        bias_correction=True,
    )
    if config.optimizer == "adamw":
        return adamw
    muon = Muon(MUON_RATE * config.learning_rate)
    return optim.MultiOptimizer([muon, adamw], [is_hidden_matrix])


BATCHED = 4 << 20
"""Most numbers in the matrices that Muon orthogonalizes together, which copies them."""


class Muon(optim.Muon):
    """MLX's Muon, which orthogonalizes small matrices of one shape together.

    Newton-Schulz needs fifteen products for each matrix. Those of a few hundred rows take a GPU
    less time than it needs to start them.
    """

    def __init__(self, learning_rate: float):
        super().__init__(learning_rate, weight_decay=0.0)

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> Any:
        """The new parameters; see `optim.Optimizer.apply_gradients`.

        All are matrices or convolutions, which count as matrices with a row per output channel.
        """
        self.state["step"] = self.step + 1
        updates = dict(tree_flatten(tree_map(self._momentum, gradients, self.state)))
        shapes: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for path, update in updates.items():
            shapes[update.shape].append(path)
        for shape, paths in shapes.items():
            rows, columns = shape[0], math.prod(shape[1:])
            rate = self.learning_rate * max(1, rows / columns) ** 0.5
            count = max(1, BATCHED // (rows * columns))
            for k in range(0, len(paths), count):
                some = paths[k : k + count]
                stacked = mx.stack([updates[path].reshape(rows, columns) for path in some])
                found = (rate * orthogonalize(stacked)).reshape(-1, *shape)
                updates.update(zip(some, found, strict=True))
        return tree_map(
            lambda _, p, u: p - u, gradients, parameters, tree_unflatten(list(updates.items()))
        )

    def _momentum(self, gradient: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["v"] = self.momentum * state["v"] + (1 - self.momentum) * gradient
        return (1 - self.momentum) * gradient + self.momentum * state["v"]


def orthogonalize(matrices: mx.array, *, steps: int = 5) -> mx.array:
    """Matrices (N, m, n) with singular values near 1, by Muon's Newton-Schulz iteration.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.swapaxes(1, 2) if tall else matrices
    x = x / (mx.linalg.norm(x, axis=[1, 2], keepdims=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.swapaxes(1, 2)
        polynomial = mx.addmm(b * square, square, square, alpha=c)
        x = mx.addmm(a * x, polynomial, x)
    return x.swapaxes(1, 2) if tall else x


def set_learning_rate(optimizer: Any, config: TrainingConfig, step: mx.array) -> None:
    """The learning rate of the optimizer's next step, which is step `step` of the run."""
    for part in getattr(optimizer, "optimizers", [optimizer]):
        factor = MUON_RATE if isinstance(part, Muon) else 1
        part.state["learning_rate"] = scheduled_rate(
            config, step, own_step=part.step, factor=factor
        )


@dataclass(frozen=True)
class Role:
    """Parameters with a separate optimizer and gradient clip.

    Attributes:
        owns: whether a parameter's dotted path belongs to the role.
    """

    name: str
    owns: Callable[[str], bool] = lambda path: True


class Optimizers:
    """An optimizer and a gradient clip for each role, over the parameters of one model.

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

    def update(
        self, model: nn.Module, gradients: dict[str, Any], *, step: mx.array
    ) -> dict[str, mx.array]:
        """Step `step` of the run, of all roles that have gradients.

        Returns:
            the norms of the roles' gradients before the clip.
        """
        norms = {}
        for role in self.roles:
            part = self._part(gradients, role)
            if not part:
                continue
            optimizer = self._optimizers[role.name]
            # Norms are sums, and a sum of bfloat16 stops growing at 256 times its terms.
            part = tree_map(lambda g: g.astype(mx.float32), part)
            part, norm = optim.clip_grad_norm(part, self.config.max_grad_norm)
            set_learning_rate(optimizer, self.config, step)
            optimizer.update(model, part)
            norms["grad_norm" if self._single else f"grad_norm_{role.name}"] = norm
        return norms

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

    def split(self, state: dict[str, mx.array]) -> dict[str, mx.array]:
        """A flat state of one optimizer for all parameters, as older versions saved it, by role.

        Every role gets its step count. The state of these roles is returned as it is.
        """
        if self._single or not {"step", "states.0.step"} & state.keys():
            return state
        found = {}
        for key, value in state.items():
            path = re.sub(r"^states\.\d+\.", "", key)
            for role in self.roles:
                if path in ("step", "learning_rate") or role.owns(path.rpartition(".")[0]):
                    found[f"{role.name}.{key}"] = value
        return found

    @property
    def _single(self) -> bool:
        return len(self.roles) == 1

    def _part(self, tree: dict[str, Any], role: Role) -> dict[str, Any]:
        if self._single:
            return tree
        mine = [(k, v) for k, v in tree_flatten(tree) if role.owns(k)]
        return dict(tree_unflatten(mine)) if mine else {}


def is_hidden_matrix(path: str, weight: mx.array) -> bool:
    """Whether Muon trains a parameter: a matrix or convolution from hidden to hidden, no table."""
    if weight.ndim == 4:
        return re.search(r"blocks\d*\.", path) is not None
    inside = ("blocks.", "layers.", "long_skips.", "sample.")
    return weight.ndim == 2 and "modulation" not in path and any(p in path for p in inside)


def scheduled_rate(
    config: TrainingConfig, step: mx.array, *, own_step: mx.array, factor: float = 1
) -> mx.array:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`.

    The cosine follows the run, so that a role that is trained in few of its steps ends at the final
    rate, too. The warm-up counts the role's own steps: until then, its optimizer's averages are
    inaccurate.

    Args:
        step: of the run, from 0.
        own_step: steps of the role so far.
        factor: of the learning rate.
    """
    warmup, peak = max(1, config.warmup_steps), factor * config.learning_rate
    rise = optim.linear_schedule(peak / warmup, peak, warmup)
    cosine = optim.cosine_decay(
        peak, max(1, config.steps - warmup), factor * config.final_learning_rate
    )
    rate = cosine(mx.maximum(step.astype(mx.float32) - warmup, 0))
    lower = mx.where(step <= warmup, 1, rate / peak)
    return mx.where(own_step < warmup, lower * rise(own_step), rate)
