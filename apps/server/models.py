"""The models that the server offers, by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import BUILT_IN, ModelChoice, check_choice, held_widths, parse_width


@dataclass(frozen=True)
class Served:
    """A model that clients may choose."""

    name: str
    """Its own; clients may also use an alias."""
    choice: ModelChoice
    config: Description


def name_models(
    opened: Sequence[tuple[ModelChoice, Description]],
    *,
    widths: Sequence[str],
    aliases: Sequence[tuple[str, str]],
) -> dict[str, Served]:
    """The models by the names that clients may use, the default first.

    A model has the name in its config or, if another one has that too, what the user called it;
    other widths than full are appended to it.

    Args:
        opened: choices of any width, with their configs.
        widths: names of network widths; a model without one of them has the others.
        aliases: (another name, name of a model, what the user called it, or the last part of
            either, in any case).

    Raises:
        UserError: a width that no model has, a model that has none of them, a choice that its model
            does not support, or a name that is unknown or given twice.
    """
    names = Counter(config.name for _, config in opened)
    wanted = {name: parse_width(name) for name in dict.fromkeys(widths)}
    missing = [
        name
        for name, width in wanted.items()
        if not any(width in held_widths(config) for _, config in opened)
    ]
    models: dict[str, Served] = {}
    for choice, config in opened:
        own = config.name if names[config.name] == 1 else choice.model or BUILT_IN
        held = [name for name, width in wanted.items() if width in held_widths(config)]
        for width in missing or held or wanted:
            check_choice(config, chosen := replace(choice, model_width=width))
            name = own if width == "full" else f"{own}-{width}"
            if name in models:
                raise UserError(f"two models have the name {name}: give each --model once")
            models[name] = Served(name, chosen, config)
    for name, given in aliases:
        target = find_served(models, given) or _find_short(models, given)
        if target is None:
            raise UserError(f"--alias {name}={given}: no such model, known: {', '.join(models)}")
        if name in models:
            raise UserError(f"--alias {name}={given}: the name {name} is taken")
        models[name] = models[target]
    return models


def find_served(models: Mapping[str, Served], name: str) -> str | None:
    """The key in `models` of the one that `name` is the key of, or that --model was given as; None
    if there is none."""
    if name in models:
        return name
    given = ((key, served.choice.model or BUILT_IN) for key, served in models.items())
    return next((key for key, model in given if model == name), None)


def _find_short(models: Mapping[str, Served], name: str) -> str | None:
    """The key in `models` of the only one that has `name` in another case, or as the last part of
    what --model was given as; None if there is none."""

    def names(key: str) -> set[str]:
        given = models[key].choice.model or BUILT_IN
        last = Path(given).name
        return {n.casefold() for n in (key, given, last, last.removesuffix(".safetensors"))}

    found = [key for key in models if name.casefold() in names(key)]
    # A model of several widths has that of the first one, as in `find_served`.
    return found[0] if len({models[key].choice.model for key in found}) == 1 else None
