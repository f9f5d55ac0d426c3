"""The formats of model folders, by their files, without an import of any model."""

from pathlib import Path

from mlx_snapgen.files import read_object

CONFIG = "teacher.json"
"""Describes a public model that was converted."""

INDEX = "model_index.json"
"""Describes one in diffusers' format."""

MINIT2I = "minit2i-b-16"
"""Folder in MiniT2I's repository with the model that is drawn with. Its text encoder is in another
repository."""


def is_teacher(folder: Path) -> bool:
    """Whether `folder` contains a public teacher."""
    return (folder / CONFIG).is_file()


def is_public(folder: Path) -> bool:
    """Whether a folder is a model in diffusers' format."""
    return (folder / INDEX).is_file() or find_minit2i(folder) is not None


def find_minit2i(folder: Path) -> str | None:
    """Where MiniT2I is in a folder, "" or ending in /; None for other models."""
    for inside in ("", f"{MINIT2I}/"):
        path = folder / inside / "transformer" / "config.json"
        if path.is_file() and read_object(path).get("_class_name") == "MiniT2IMMJiTModel":
            return inside
    return None
