"""What a caller may set: names of widths, limits, and their checks. No mlx here."""

import operator
import secrets
from typing import Any

from mlx_snapgen.config import WIDTH_NAMES, ModelConfig
from mlx_snapgen.errors import UserError, nearest

MAX_SEED = 2**63 - 1


MAX_STEPS = 1000


def parse_width(name: str) -> float:
    """`WIDTH_NAMES[name]`; an unknown name is a `UserError`."""
    if name not in WIDTH_NAMES:
        known = ", ".join(WIDTH_NAMES)
        raise UserError(f"no model width '{name}'{nearest(str(name), WIDTH_NAMES)}, known: {known}")
    return WIDTH_NAMES[name]


def check_width(config: ModelConfig, name: str) -> None:
    """`UserError` unless the model of `config` holds the named width."""
    held = [n for n, width in WIDTH_NAMES.items() if width in config.transformer.widths]
    if parse_width(name) not in config.transformer.widths:
        raise UserError(
            f"this model has no width '{name}', only {', '.join(held)}: choose one with model_width"
        )


def check_size(config: ModelConfig, height: int, width: int) -> None:
    """`UserError` naming the nearest good size unless the network takes pictures of this size."""
    unit = config.size_unit
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int):
            raise UserError(f"{name} takes pixels, got {side!r} (the network's is model_width)")
        if side < 1 or side % unit:
            good = max(unit, round(side / unit) * unit)
            raise UserError(
                f"{name} must be a positive multiple of {unit} pixels: {side} is not, {good} is"
            )


def whole_number(name: str, value: Any, least: int, most: int = MAX_SEED) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise UserError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    return number


def random_seed() -> int:
    """A seed short enough to type."""
    return secrets.randbelow(2**32)
