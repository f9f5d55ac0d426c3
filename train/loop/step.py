"""A training step over explicit state, compiled: gradients, update and averages of a model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from train.data.source import Batch
from train.loop.config import TrainingConfig
from train.loop.optimizer import Optimizers, Role
from train.objectives.base import Objective


class CompiledStep:
    """The state that a step changes, and its two compiled parts.

    Args:
        model, objective, config, roles: see `Trainer`; the model's trainable weights get float32.
        group: the processes of the job.

    Attributes:
        gradients: the `step` of the objective's gradients -> a function (one compilation for each)
            that adds a micro-batch to the sums of gradients and metrics; sums None start them.
        update: the sums of this process -> metrics and `stop`, averaged over all processes, after
            the change of the weights.
        state: all that `update` changes.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Any, Any],
        *,
        config: TrainingConfig,
        roles: Sequence[Role],
        group: mx.distributed.Group,
    ):
        self._model = model
        model.update(_cast(model.trainable_parameters(), mx.float32))
        self.optimizers = Optimizers(config, roles)
        self.optimizers.init(model.trainable_parameters())
        # mx.compile captures the containers, so the averages stay in one dict.
        self._averages = {"ema": tree_map(mx.array, model.trainable_parameters())}

        def add_gradients(step: Any, total: Any, batch: Batch, key: mx.array):
            weights = model.parameters()
            model.update(_cast(weights, config.dtype))
            grads, metrics = objective.gradients(model, batch, key, step)
            model.update(weights)
            new = _cast((grads, metrics), mx.float32)
            return new if total is None else tree_map(mx.add, total, new)

        def update(grads, metrics, step: mx.array, stop: mx.array):
            grads = tree_map(lambda g: g / config.accumulate, grads)
            grads = nn.average_gradients(grads, group)
            values = mx.stack([*(m / config.accumulate for m in metrics.values()), stop])
            values = mx.distributed.all_sum(values, group=group) / group.size()
            norms = self.optimizers.update(model, grads, step=step)
            # A shorter average at first, so that the initial weights never dominate it.
            count = step.astype(mx.float32) + 1
            decay = mx.minimum(config.ema_decay, (1 + count) / (10 + count))
            self._averages["ema"] = tree_map(
                # Exact where they are equal: the averages of frozen weights do not drift.
                lambda a, p: a + (1 - decay) * (p - a),
                self.averages,
                model.trainable_parameters(),
            )
            return dict(zip(metrics, values, strict=False)) | norms, values[-1]

        self.state = [model.state, self.optimizers.state, self._averages]

        def compiled(step: Any) -> Any:
            return mx.compile(functools.partial(add_gradients, step), inputs=[model.state])

        self.gradients: Callable[[Any], Any] = functools.cache(compiled)
        self.update = mx.compile(update, inputs=self.state, outputs=self.state)

    @property
    def averages(self) -> dict[str, Any]:
        """The averaged parameters, shaped like `model.trainable_parameters()`."""
        return self._averages["ema"]

    def trees(self) -> dict[str, dict]:
        """The state by the names in `TREES` of `train.loop.checkpoint`."""
        return {
            "model": self._model.trainable_parameters(),
            "ema": self.averages,
            "optimizer": self.optimizers.state,
        }

    def set_trees(self, trees: dict[str, dict]) -> None:
        """Continue from other `trees`."""
        self._model.update(trees["model"])
        self._averages["ema"] = trees["ema"]
        self.optimizers.state = trees["optimizer"]
        # Otherwise an optimizer does this for the parameters that its next gradients have.
        self.optimizers.init(self._model.trainable_parameters())
        self.state[1] = self.optimizers.state


def _cast(tree, dtype: mx.Dtype):
    """`tree` with its floating arrays in `dtype`."""
    return tree_map(lambda x: x.astype(dtype) if mx.issubdtype(x.dtype, mx.floating) else x, tree)
