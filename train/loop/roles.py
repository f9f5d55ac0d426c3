"""The roles of distillation: which parameters share an optimizer and a gradient clip."""

from collections.abc import Sequence

from train.data.simulation import STUDENT
from train.loop.optimizer import Role
from train.objectives.kdmd import critic_name


def distillation_roles(shares: Sequence[float]) -> list[Role]:
    """Roles of a `Student` of these widths: the model, and each width's projector."""
    model = Role("model", lambda path: not path.startswith("projectors."))
    return [model, *_projectors(shares)]


def kdmd_roles(shares: Sequence[float]) -> list[Role]:
    """Roles of a `Distilled` of these widths: the student, and each width's critic and projector.

    With one step count for all, the student, which steps once every `--student-every` iterations,
    would move about twice as far as alone at first; with one clip, its gradient would shrink that
    of the critic.
    """
    adapters = [_adapter(name) for name in (STUDENT, *map(critic_name, shares))]
    return [*adapters, *_projectors(shares)]


def _adapter(name: str) -> Role:
    return Role(name, lambda path: name in path.split("."))


def _projectors(shares: Sequence[float]) -> list[Role]:
    def role(index: int, share: float) -> Role:
        return Role(
            f"projector_{round(1000 * share)}",
            lambda path: path.startswith(f"projectors.{index}."),
        )

    return [role(i, share) for i, share in enumerate(shares)]
