"""What the window remembers: settings in one JSON file, written whole or not at all."""

import dataclasses
import json
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.worker.messages import Job, ModelChoice
from mlx_snapgen.files import whole_file
from mlx_snapgen.metadata import read_settings


@dataclass(frozen=True)
class Settings:
    """The form and the window. None means the model's own value."""

    prompt: str = "a red apple to the left of a blue car"
    negative_prompt: str = ""
    seed: int = 0
    seed_locked: bool = False
    model: str | None = None
    revision: str | None = None
    model_width: str = "full"
    quantize: int | None = None
    loras: tuple[tuple[str, float], ...] = ()
    text_encoders: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    few_step: bool | None = None
    attention_modulation: bool = False
    num_images: int = 1
    appearance: str = "system"
    """"light", "dark" or "system"."""
    geometry: str = ""
    """Of the window, as Tk writes it."""
    recent_models: tuple[str, ...] = ()
    folder: str = ""
    """Where a picture was saved last."""

    def choice(self) -> ModelChoice:
        """The model these settings draw with."""
        return ModelChoice(
            self.model,
            self.revision,
            self.model_width,
            self.quantize,
            self.loras,
            self.text_encoders,
        )

    def job(self) -> Job:
        """The pictures these settings ask for."""
        names = {f.name for f in dataclasses.fields(Job)} & {f.name for f in PICTURE_FIELDS}
        return Job(self.choice(), **{name: getattr(self, name) for name in names})

    def restored(self, path: str | Path) -> "Settings":
        """These settings with those that a picture was drawn with; `UserError` if it has none."""
        values = read_settings(path)
        values["loras"] = tuple(values["loras"])
        names = values["text_encoders"]
        values["text_encoders"] = None if names is None else tuple(map(str, names))
        taken = {f.name: values[f.name] for f in PICTURE_FIELDS if f.name in values}
        return dataclasses.replace(self, **taken, seed_locked=True, num_images=1)


WINDOW_FIELDS = {"seed_locked", "appearance", "geometry", "recent_models", "folder"}
PICTURE_FIELDS = [f for f in dataclasses.fields(Settings) if f.name not in WINDOW_FIELDS]


def data_folder() -> Path:
    """Where this system keeps an application's data."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx_snapgen"
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "mlx_snapgen"


def load_settings(path: Path) -> tuple[Settings, str | None]:
    """The settings in `path`, and what had to be done to read them.

    A file that is damaged is set aside under another name; settings of the wrong type or that this
    version does not know are left out.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        return Settings(), None
    except OSError as error:
        return Settings(), f"cannot read {path}: {error.strerror}"
    except ValueError:
        aside = _set_aside(path)
        return Settings(), f"the settings were damaged and are set aside as {aside.name}"
    known, odd = {}, []
    hints = typing.get_type_hints(Settings)
    for name, value in values.items():
        try:
            known[name] = _read(hints[name], value)
        except (KeyError, TypeError, ValueError):
            odd.append(name)
    notice = f"left out of the settings: {', '.join(odd)}" if odd else None
    return Settings(**known), notice


def save_settings(path: Path, settings: Settings) -> None:
    """Write whole or not at all; raises OSError."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(settings), indent=1), encoding="utf-8")


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, aside)
    return aside


def _read(kind: Any, value: Any) -> Any:
    """`value` as the annotated type `kind`; TypeError or ValueError when it is of another."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        return _read(next(k for k in kind.__args__ if k is not types.NoneType), value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError
        parts = kind.__args__
        if parts[-1] is Ellipsis:
            return tuple(_read(parts[0], v) for v in value)
        return tuple(_read(part, v) for part, v in zip(parts, value, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value
