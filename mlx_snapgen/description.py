"""What can be said of a model from its config alone. Does not import mlx."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from mlx_snapgen.errors import UserError


class Sampler(Protocol):
    """The own numbers of a mode of a model."""

    @property
    def num_inference_steps(self) -> int: ...
    @property
    def guidance_scale(self) -> float: ...


Mode = TypeVar("Mode", bound=Sampler)


def choose_mode(
    sampler: Mode, few: Mode | None, *, num_inference_steps: int | None, few_step: bool | None
) -> Mode:
    """`few` or `sampler`, the few-step mode of a model or its usual one.

    Args:
        num_inference_steps: None, or at most twice the steps of the few-step mode, selects that
            mode.
        few_step: whether to use that mode; None decides by the number of steps.

    Raises:
        UserError: `few_step` is true, but the model has no such mode.
    """
    if few_step and few is None:
        raise UserError("this model has no few-step mode: draw without it")
    if few is None or few_step is False:
        return sampler
    most = 2 * few.num_inference_steps
    chosen = few_step or num_inference_steps is None or num_inference_steps <= most
    return few if chosen else sampler


@dataclass(frozen=True)
class Abilities:
    """What a mode of a model can do besides drawing a prompt."""

    guidance: bool = True
    """Guidance and negative prompts."""
    attention_modulation: bool = True
    part_of_text_encoders: bool = True
    """Whether it draws with some of its text encoders alone."""
    edit: bool = False
    """Whether it takes pictures to edit."""
    any_size: bool = False
    """Whether it draws all sizes well, not its default alone."""
    batches: bool = True
    """Whether it draws several pictures at a time."""
    alpha: bool = False
    """Whether its pictures have transparent parts."""


class Description(Protocol):
    """What can be said of a model from its config alone; `ModelConfig`, `TeacherConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def image_size(self) -> tuple[int, int]:
        """Default (height, width) in pixels."""
        ...

    @property
    def trained_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of all pictures it was trained on; empty: not known."""
        ...

    @property
    def size_unit(self) -> int:
        """Height and width in pixels are multiples of this."""
        ...

    @property
    def widths(self) -> tuple[float, ...]:
        """Shares of the hidden dimensions that the network can run with."""
        ...

    @property
    def few_step(self) -> Sampler | None:
        """The few-step mode; None if there is none."""
        ...

    def sampler_for(
        self, num_inference_steps: int | None = None, few_step: bool | None = None
    ) -> Sampler:
        """The mode that these arguments choose (`choose_mode`)."""
        ...

    def time_shift(
        self, height: int, width: int, *, few_step: bool = False, num_inference_steps: int = 0
    ) -> float:
        """The shift of the noise levels of a picture."""
        ...

    def abilities(self, *, few_step: bool = False) -> Abilities:
        """What the few-step mode can do, or the usual one."""
        ...
