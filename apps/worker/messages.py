"""The messages to and from the worker process. Does not import mlx."""

from dataclasses import dataclass
from typing import Any

from mlx_snapgen.description import Description
from mlx_snapgen.settings import DrawSettings, ModelChoice


@dataclass(frozen=True)
class Job:
    """Pictures to draw."""

    choice: ModelChoice
    """Equal choices share a loaded pipeline."""
    settings: DrawSettings | None = None
    """None: only load the model."""
    previews: int | None = None
    """Previews per picture, spread over its steps; None shows every step, 0 none."""
    png_previews: bool = False
    """Previews as PNG files instead of pixels."""


@dataclass(frozen=True)
class Event:
    """A message about a job."""

    job: int


@dataclass(frozen=True)
class Downloading(Event):
    name: str
    done: int
    total: int
    """Bytes; 0 while unknown."""


@dataclass(frozen=True)
class Converting(Downloading):
    """A part of a public model is converted, once."""


@dataclass(frozen=True)
class Loading(Event):
    pass


@dataclass(frozen=True)
class Loaded(Event):
    """The model is ready; `config` is the whole model's, with all its widths.

    It is a `ModelConfig`, or a `TeacherConfig` of a public model.
    """

    choice: ModelChoice
    config: Description


@dataclass(frozen=True)
class Notice(Event):
    text: str


@dataclass(frozen=True)
class Progress(Event):
    """A step is done."""

    image: int
    index: int
    num_steps: int
    seed: int
    size: tuple[int, int]
    """(width, height) in pixels."""
    preview: bytes | None
    """The x0 estimate as RGB bytes, or PNG with `Job.png_previews`."""


@dataclass(frozen=True)
class Picture(Event):
    image: int
    size: tuple[int, int]
    rgb: bytes
    png: bytes
    """The file, with `metadata` in it."""
    name: str
    """A file name without ending, made of the prompt."""
    metadata: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Finished(Event):
    """The last event of a job that was completed or canceled."""

    cancelled: bool = False


@dataclass(frozen=True)
class Failed(Event):
    """The last event of a job that failed."""

    message: str
    details: str | None = None
    """Traceback of a bug; None for a user's mistake."""


@dataclass(frozen=True)
class Cancel:
    job: int
