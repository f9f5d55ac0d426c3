"""The messages to and from the worker process. Does not import mlx."""

from dataclasses import dataclass
from typing import Any

from mlx_snapgen.description import Description
from mlx_snapgen.settings import DrawSettings, ModelChoice


@dataclass(frozen=True)
class FileFormat:
    """A format of picture files."""

    kind: str = "png"
    """png, jpeg or webp. A PNG has the settings as metadata."""
    quality: int = 100
    """Of JPEG and WebP, 0 to 100."""
    opaque: bool = False
    """Transparent parts are over white, as always in JPEG."""


@dataclass(frozen=True)
class Job:
    """Pictures to draw."""

    choice: ModelChoice
    """Equal choices share a loaded pipeline."""
    settings: DrawSettings | None = None
    """None: only load the model, or open it."""
    load: bool = True
    """Without settings: false only reads the model's config. A model that is not on this machine is
    fetched before, and a public one converted."""
    fetch: bool = True
    """If it is not loaded: false fetches and converts nothing but the config."""
    previews: int | None = None
    """Previews per picture, spread over its steps; None shows every step, 0 none."""
    file_format: FileFormat | None = None
    """Of the pictures and the previews; None: PNG, with previews as pixels."""
    enlarged: tuple[int, int] | None = None
    """(width, height) that pictures and previews are scaled to when they are drawn; None: none."""


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
class Opened(Event):
    """The model is on this machine; `config` is the whole model's, with all its widths.

    It is a `ModelConfig`, or a `TeacherConfig` of a public model.
    """

    choice: ModelChoice
    config: Description


@dataclass(frozen=True)
class Loaded(Opened):
    """The model is ready to draw."""

    words: dict[str, list[str]] | None = None
    """Those that the model understands, by their kind; None: any, or not known."""


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
    """The x0 estimate as RGB bytes, or as a file of `Job.file_format`."""


@dataclass(frozen=True)
class Picture(Event):
    image: int
    size: tuple[int, int]
    rgb: bytes
    file: bytes
    """In `Job.file_format`; a PNG has `metadata` in it."""
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
    internal: bool = False
    """The message may name files of this machine that a server's clients must not see: the model
    cannot be loaded, or there is a bug."""


@dataclass(frozen=True)
class Cancel:
    job: int
