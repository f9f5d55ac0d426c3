"""What goes to the worker's process, and what comes out. No mlx here."""

from dataclasses import dataclass
from typing import Any

from mlx_snapgen.config import ModelConfig


@dataclass(frozen=True)
class ModelChoice:
    """What `SnapGenPipeline.from_pretrained` is given; equal choices share a loaded pipeline."""

    model: str | None = None
    revision: str | None = None
    model_width: str = "full"
    quantize: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    text_encoders: tuple[str, ...] | None = None
    keep_text_encoders: bool = False


@dataclass(frozen=True)
class Job:
    """Pictures to draw; the fields after `prompt` are arguments of `SnapGenPipeline.generate`."""

    choice: ModelChoice
    prompt: str | None
    """None only loads the model."""
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    few_step: bool | None = None
    attention_modulation: bool = False
    seed: int | None = None
    num_images: int = 1
    previews: int | None = None
    """Previews per picture, spread over its steps; None shows every step, 0 none."""
    png_previews: bool = False
    """Previews as PNG files instead of pixels."""


@dataclass(frozen=True)
class Event:
    """Something the worker says about a job."""

    job: int


@dataclass(frozen=True)
class Downloading(Event):
    name: str
    done: int
    total: int
    """Bytes; 0 while unknown."""


@dataclass(frozen=True)
class Loading(Event):
    pass


@dataclass(frozen=True)
class Loaded(Event):
    """The model is ready; `config` is the whole model's, with all its widths."""

    choice: ModelChoice
    config: ModelConfig


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
    """The x0 estimate as RGB bytes, or PNG where the job asked for it."""


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
    """The job's last event when all went well."""

    cancelled: bool = False


@dataclass(frozen=True)
class Failed(Event):
    """The job's last event otherwise."""

    message: str
    details: str | None = None
    """Traceback of a bug; None for a user's mistake."""


@dataclass(frozen=True)
class Cancel:
    job: int
