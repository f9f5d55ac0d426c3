"""Dataclasses from and to JSON values; what is read may be of unknown origin."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, cast

from mlx_snapgen.errors import UserError, check_faults, naming, nearest, one_line


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


MOST = {int: 2**22, float: 1e9, str: 4096, tuple: 4096}
"""The largest number in a config, and the greatest length of a text or list."""
MOST_FAULTS = 50
"""Of a config that are looked for."""
MAY_BE_ZERO = ("band_radius", "rope_axes")
"""Whole numbers that may be 0, besides those of blocks and layers."""
REMOVED = ("semantic_channels", "semantic_blocks", "semantic_keys", "semantic_rank")
"""Keys of configs that were never released; 0 in those without semantic latents."""
MOST_LAYERS = 256
"""Of one network. Each is built in memory before its weights are read."""


def from_dict(cls: type, values: Any) -> Any:
    """Build config `cls` from JSON values of unknown origin.

    Raises:
        UserError: unknown keys, with the nearest known ones, and values of another type or out of
            range.
    """
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__} must be an object, not {_shown(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    faults, read = [], {}
    for key, value in values.items():
        try:
            if key in REMOVED and value == 0:
                continue
            if key not in fields:
                raise UserError(f"unknown key '{key}' in {cls.__name__}{nearest(key, fields)}")
            read[key] = _read(fields[key].type, value, key)
        except UserError as error:
            faults.append(str(error))
            if len(faults) == MOST_FAULTS:
                break
    check_faults(faults)
    try:
        made = cls(**read)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(f"{cls.__name__} has values that do not fit together: {error}") from None
    _check_layers(made)
    return made


def checked(config: Any) -> Any:
    """A config made of values of unknown origin; `UserError` as from `from_dict`."""
    return from_dict(type(config), to_dict(config))


def whole_number(value: Any, key: str) -> int:
    """A size of unknown origin, before it multiplies; `UserError` as from `from_dict`."""
    return _read(int, value, key)


POSITIVE = ("eps", "epsilon", "rope_theta")
"""Ends of the keys of numbers above 0."""


def check_positive(values: Any) -> None:
    """`UserError` for a number of `POSITIVE` that is not above 0, also in the objects in `values`.

    The keys of other libraries are not those of a dataclass.
    """
    for key, value in values.items() if isinstance(values, dict) else ():
        check_positive(value)
        if isinstance(key, str) and key.endswith(POSITIVE) and value is not None:
            _read(float, value, key)


def check_only(values: Any, only: Mapping[str, tuple[Any, ...]], path: object) -> None:
    """`UserError` for a setting of another library that has no effect here, but would have there.

    Args:
        only: key -> its values without such an effect, besides null and no value.
    """
    for key, known in only.items():
        value = values.get(key) if isinstance(values, dict) else None
        if value is not None and value not in known:
            raise UserError(f"{path}: '{key}' {_shown(value)} is not supported")


SIZES = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
SIZES += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""What config.json of a language model in Hugging Face's format may contain, also for its text."""


def check_sizes(values: dict[str, Any], path: object) -> None:
    """Sizes of a language model that another library builds in memory before it reads weights.

    Raises:
        UserError: names `path`, the model's config.json; a size is no whole number or out of range,
            or see `check_positive`.
    """
    with naming(path):
        text = values.get("text_config", {})
        if not isinstance(text, dict):
            raise UserError(f"'text_config' must be an object, not {_shown(text)}")
        for key, value in [(k, found[k]) for found in (values, text) for k in SIZES if k in found]:
            if whole_number(value, key) > MOST_LAYERS and "layers" in key:
                raise UserError(f"'{key}' must be 0 to {MOST_LAYERS}, not {_shown(value)}")
        check_positive(values)


def _read(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type of a dataclass's field; `UserError` names `key`."""
    if isinstance(kind, types.UnionType):
        if value is None and types.NoneType in kind.__args__:
            return None
        kind = next(k for k in kind.__args__ if k is not types.NoneType)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return from_dict(cast(type, kind), value)
    kind, items = typing.get_origin(kind) or kind, typing.get_args(kind)
    stored: Any = {tuple: list, float: (int, float)}.get(kind, kind)
    if not isinstance(value, stored) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"'{key}' must be {_NAMES[kind]}, not {_shown(value)}")
    value = cast(Any, value)
    least = 0 if key.endswith(("blocks", "layers")) or key in MAY_BE_ZERO else 1
    if kind is int and not least <= value <= MOST[int]:
        raise UserError(f"'{key}' must be {least} to {MOST[int]}, not {_shown(value)}")
    if kind is float and not abs(value) <= MOST[float]:
        raise UserError(f"'{key}' must be at most {MOST[float]:g}, not {_shown(value)}")
    if kind is float and key.endswith(POSITIVE) and value <= 0:
        raise UserError(f"'{key}' must be above 0, not {_shown(value)}")
    if kind in (str, tuple) and len(value) > MOST[kind]:
        raise UserError(f"'{key}' is longer than {MOST[kind]}")
    if kind is not tuple:
        return value
    if items[-1] is ...:
        return tuple(_read(items[0], item, key) for item in value)
    if len(items) != len(value):
        raise UserError(f"'{key}' takes {len(items)} values, not {len(value)}")
    return tuple(_read(item, v, key) for item, v in zip(items, value, strict=True))


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    tuple: "a list",
    dict: "an object",
}


def _shown(value: Any) -> str:
    return one_line(json.dumps(value), 40)


def _check_layers(config: Any) -> None:
    """`UserError` for more layers than a machine has memory for their names."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name.endswith("blocks") or (f.name.startswith("num_") and "layers" in f.name):
            counts = value if isinstance(value, tuple) else (value,)
            if min(counts, default=0) < 0 or sum(counts) > MOST_LAYERS:
                raise UserError(f"'{f.name}' must be 0 to {MOST_LAYERS} layers, not {value}")
