"""Objectives: the losses that a training step minimizes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.products import trained
from train.data.source import Batch

Metrics = dict[str, mx.array]
Model = TypeVar("Model", bound=nn.Module)
AnyModel = TypeVar("AnyModel", bound=nn.Module, contravariant=True)
Step = TypeVar("Step", contravariant=True)
Aux = TypeVar("Aux")


class Objective(Protocol[AnyModel, Step]):
    """Gradients of one micro-batch, for `Trainer`.

    Most objectives are one loss, see `LossObjective`; an objective of several losses combines their
    gradients itself.
    """

    def gradients(
        self, model: AnyModel, batch: Batch, key: mx.array, step: Step
    ) -> tuple[dict[str, Any], Metrics]:
        """Gradients and metrics, compiled by the trainer once for each `step`.

        Args:
            model: its weights may be bfloat16: cast the inputs, and take losses in float32.
            batch: from the trainer's `batches`.
            key: of the random numbers.
            step: the step's arguments, a NamedTuple of hashable values.

        Returns:
            gradients nested like `model.trainable_parameters()`, of all or of some of them, and
            scalars to log.
        """
        ...


class LossObjective(ABC, Generic[Model, Step]):
    """An objective that is one loss."""

    @abstractmethod
    def loss(
        self, model: Model, batch: Batch, key: mx.array, step: Step
    ) -> tuple[mx.array, Metrics]:
        """The scalar loss and the metrics; arguments are those of `Objective.gradients`."""
        ...

    def gradients(
        self, model: Model, batch: Batch, key: mx.array, step: Step
    ) -> tuple[dict[str, Any], Metrics]:
        """See `Objective`."""
        (_, metrics), grads = value_and_grad(model, lambda: self.loss(model, batch, key, step))
        return grads, metrics


class ShareStep(NamedTuple):
    """Arguments of a step that trains one width."""

    share: float
    """Of the network's width."""


def value_and_grad(
    model: nn.Module,
    loss: Callable[..., tuple[mx.array, Aux]],
    inputs: Sequence[Any] = (),
    *,
    parameters: dict[str, Any] | None = None,
) -> tuple[tuple[mx.array, Aux], Any]:
    """A loss and its gradients; the model keeps its parameters.

    Args:
        loss: (*inputs) -> (scalar, anything else), computed with `model`.
        inputs: further trees of arrays to differentiate with respect to.
        parameters: those to differentiate with respect to; None: all trainable ones.

    Returns:
        what `loss` returned, and the gradients of the parameters; with `inputs` a tuple of these
        and of each input's.
    """
    parameters = model.trainable_parameters() if parameters is None else parameters

    def of_parameters(parameters, *inputs):
        model.update(parameters)
        return loss(*inputs)

    argnums = tuple(range(1 + len(inputs)))
    with trained():
        result = mx.value_and_grad(of_parameters, argnums=argnums)(parameters, *inputs)
    model.update(parameters)
    return result  # type: ignore[return-value]
