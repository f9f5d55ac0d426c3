"""The window's settings: one JSON file, written whole or not at all."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apps.desktop.inputs import Inputs
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.metadata import MAX_PIXELS, read_settings
from mlx_snapgen.reading import MOST_JSON, open_regular, parse_json
from mlx_snapgen.settings import DrawSettings, ModelChoice, read_fields

FIRST = DrawSettings("a red apple to the left of a blue car")
"""Content of the form at the first start."""
MAX_INPUTS = 50
"""Most `Settings.recent_inputs`."""


@dataclass(frozen=True)
class Settings:
    """The form and the window."""

    draw: DrawSettings = FIRST
    choice: ModelChoice = field(default_factory=ModelChoice)
    seed_locked: bool = False
    """False draws each picture with a new random seed."""
    appearance: str = "system"
    """"light", "dark" or "system"."""
    geometry: str = ""
    """Of the window, as Tk writes it."""
    recent_models: tuple[str, ...] = ()
    folder: str = ""
    """Folder of the picture that was saved or opened last."""
    recent_inputs: tuple[str, ...] = ()
    """Files that pictures were drawn from, the latest first."""

    def restored(self, path: Path, inputs: Inputs) -> tuple["Settings", str]:
        """These settings with those in a picture, and a notice of what is not taken, or "".

        `UserError` if the picture has no settings.
        """
        recorded = read_settings(path, max_pixels=None)
        known = [str(source) for source in (self.draw.image, self.draw.mask, *self.draw.edit)]
        draw, notice = inputs.found(recorded, expanded(path), known=[*known, *self.recent_inputs])
        assert draw.height is not None and draw.width is not None
        if draw.height * draw.width > MAX_PIXELS:
            size = f"{draw.width} x {draw.height}"
            draw = dataclasses.replace(draw, height=self.draw.height, width=self.draw.width)
            more = f"{size} is more than {MAX_PIXELS >> 20} megapixels: the form keeps its size"
            notice = f"{notice}; {more}" if notice else more
        # No picture records how the model is kept in memory.
        here = {name: getattr(self.choice, name) for name in ("keep_text_encoders", "low_memory")}
        choice = dataclasses.replace(recorded.choice, **here)
        restored = dataclasses.replace(self, draw=draw, choice=choice, seed_locked=True)
        return restored, notice

    def with_inputs(self, paths: Sequence[str]) -> "Settings":
        """These settings with more `recent_inputs`."""
        recent = dict.fromkeys([*paths, *self.recent_inputs])
        return dataclasses.replace(self, recent_inputs=tuple(recent)[:MAX_INPUTS])

    def with_model_of(self, other: "Settings") -> "Settings":
        """These settings with the model, revision, base and LoRAs of others."""
        names = ("model", "revision", "base", "loras")
        kept = {name: getattr(other.choice, name) for name in names}
        return dataclasses.replace(self, choice=dataclasses.replace(self.choice, **kept))


def data_folder() -> Path:
    """Where this system keeps an application's data."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx_snapgen"
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "mlx_snapgen"


def start_folder(last: str) -> str:
    """Where a file dialog starts: the folder used last, else that of pictures, else home."""
    home = Path.home()
    for folder in (Path(last) if last else home / "Pictures", home / "Pictures"):
        if folder.is_dir():
            return str(folder)
    return str(home)


def load_settings(path: Path) -> tuple[Settings, str | None]:
    """The settings in `path`, and a notice if some could not be read.

    A damaged file is renamed. Unknown settings, and those of the wrong type, are ignored.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            data = file.read(MOST_JSON + 1)
    except FileNotFoundError:
        return Settings(), None
    except OSError as error:
        return Settings(), f"cannot read {path}: {error.strerror}"
    try:
        values = parse_json(data, path, paths=True)
        if not isinstance(values, dict) or len(data) > MOST_JSON:
            raise UserError("not an object")
    except UserError:
        aside = _set_aside(path)
        return Settings(), f"the settings were damaged; the file is now {aside.name}"
    draw, choice, window = (
        read_fields(kind, values) for kind in (DrawSettings, ModelChoice, Settings)
    )
    odd = [name for name in values if name not in draw | choice | window]
    notice = f"ignored settings: {', '.join(odd)}" if odd else None
    base = Settings()
    draw, choice = (
        dataclasses.replace(base.draw, **draw),
        dataclasses.replace(base.choice, **choice),
    )
    return Settings(draw=draw, choice=choice, **window), notice


def save_settings(path: Path, settings: Settings) -> None:
    """Write whole or not at all; raises OSError."""
    values = dataclasses.asdict(settings)
    values = values.pop("draw") | values.pop("choice") | values
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, aside)
    return aside
