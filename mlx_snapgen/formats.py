"""The formats of model folders, by their files, without an import of any model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_snapgen.reading import read_object

CONFIG = "teacher.json"
"""Describes a public model that was converted."""

INDEX = "model_index.json"
"""Describes one in diffusers' format."""

MINIT2I = "minit2i-b-16"
"""Folder in MiniT2I's repository with the model that is drawn with. Its text encoder is in another
repository."""


PIPELINES = ("ZImagePipeline", "QwenImagePipeline", "Flux2KleinPipeline")
"""`_class_name` in model_index.json of the models that can be drawn with, except MiniT2I."""

DESCRIPTIONS = ("config.json", CONFIG, INDEX, f"{MINIT2I}/transformer/config.json")
"""Files by which a repository is recognized."""


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


def describe_foreign(folder: Path) -> str | None:
    """What a folder without a model of ours is, and what takes it; None if that is not known."""
    if (name := _public_name(folder)) is not None:
        return (
            f"{folder} is a public model ({name}), which mlx_snapgen.generate, train.lora and "
            "--teacher take: give a model of mlx_snapgen here, such as fluent"
        )
    path = folder / "config.json"
    if not (names := class_names(read_object(path) if path.is_file() else {})):
        return None
    name = names[0]
    parts = {
        "Transformer": "a transformer",
        "JiT": "a transformer",
        "Autoencoder": "an autoencoder",
    }
    what = next((part for word, part in parts.items() if word in name), "one part of a model")
    whole = next((f", {p}" for p in folder.absolute().parents[:2] if is_public(p)), "")
    return f"{folder} is {what} alone ({name}): give the folder of the whole model{whole}"


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The classes and kinds of network that the config of a public checkpoint names."""
    architectures = config.get("architectures")
    listed = architectures if isinstance(architectures, list) else []
    names = [config.get("_class_name"), *listed, config.get("model_type")]
    return [name for name in names if isinstance(name, str)]


def _public_name(folder: Path) -> str | None:
    if is_teacher(folder):
        return str(read_object(folder / CONFIG).get("kind"))
    if find_minit2i(folder) is not None:
        return "MiniT2I"
    path = folder / INDEX
    name = read_object(path).get("_class_name") if path.is_file() else None
    return name if name in PIPELINES else None
