"""Tables of the weights of public checkpoints: public name, our name, transform.

A name in a table is a pattern of segments between dots: `#` is a number, `*` one segment, `**` one
or more, `a|b` one of these words. Both names of a row have the same wildcards in the same order, so
that a row works in both directions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.module import Shapes, check_fit, listed, shapes
from mlx_snapgen.errors import UserError

Weights = dict[str, mx.array]


def unchanged(value: mx.array) -> mx.array:
    return value


class Row(NamedTuple):
    """One row of a table."""

    public: str | tuple[str, ...]
    """Several public names are the parts of one weight of ours."""
    ours: str | None
    """None for weights that are ignored."""
    transform: Callable[..., mx.array] = unchanged
    """Our weight, from the public one, or from all parts in the order of `public`."""


def same(pattern: str, transform: Callable[..., mx.array] = unchanged) -> Row:
    """A row of weights with the same name in both."""
    return Row(pattern, pattern, transform)


class Place(NamedTuple):
    """Our name of a public weight (None: ignored), and its part of that weight."""

    name: str | None
    part: int = 0
    row: Row = Row("**", "**")


class Renaming:
    """Names that a function converts, without a table.

    Args:
        rename: public name -> ours, or None; `UserError` for a name of another network.
    """

    def __init__(self, rename: Callable[[str], str | None]):
        self.rename = rename

    def find(self, key: str) -> Place:
        """Our name of a public weight; `UserError` for a weight of another network."""
        return Place(self.rename(key))

    def public(self, name: str) -> tuple[str, ...]:
        """Public names of the parts of our weight; our name if they are not known."""
        return (name,)


class KeyMap(Renaming):
    """The table of one public network. The first matching row applies.

    Args:
        network: for the message about a name that no row matches.
    """

    def __init__(self, network: str, *rows: Row):
        self.network, self.rows = network, rows
        self._compiled = [
            (
                row,
                [_compiled(name) for name in _parts(row)],
                None if row.ours is None else _compiled(row.ours),
            )
            for row in rows
        ]

    def find(self, key: str) -> Place:
        for row, public, ours in self._compiled:
            for part, (pattern, _) in enumerate(public):
                if match := pattern.fullmatch(key):
                    name = None if ours is None else ours[1].format(*match.groups())
                    return Place(name, part, row)
        raise UserError(f"'{key}' belongs to no {self.network}")

    def public(self, name: str) -> tuple[str, ...]:
        for _, public, ours in self._compiled:
            if ours and (match := ours[0].fullmatch(name)):
                return tuple(template.format(*match.groups()) for _, template in public)
        return (name,)

    def weights(self, public: Mapping[str, mx.array]) -> Weights:
        """Our weights, lazy, from a checkpoint's; without those that lack a part."""
        found: Weights = {}
        for key, value in public.items():
            name, part, row = self.find(key)
            if name is None:
                continue
            if isinstance(row.public, str):
                found[name] = row.transform(value)
            elif part == 0 and all(k in public for k in self.public(name)):
                found[name] = row.transform(*(public[k] for k in self.public(name)))
        return found


def _parts(row: Row) -> tuple[str, ...]:
    return (row.public,) if isinstance(row.public, str) else row.public


def _compiled(name: str) -> tuple[re.Pattern[str], str]:
    """Regular expression with a group for each wildcard, and format string with a {} for it."""

    def segments() -> Iterator[tuple[str, str]]:
        wildcards = {"#": r"(\d+)", "*": r"([^.]+)", "**": "(.+)"}
        for segment in name.split("."):
            if segment in wildcards or "|" in segment:
                yield wildcards.get(segment, f"({segment})"), "{}"
            else:
                yield re.escape(segment), segment

    pattern, template = zip(*segments(), strict=True)
    return re.compile(r"\.".join(pattern)), ".".join(template)


def numberless(names: Iterable[str]) -> list[str]:
    """Patterns of names, with # for every number between dots."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name in names})


def check_complete(
    keys: Renaming, public: Iterable[str], weights: Weights, expected: Shapes, *, where: object
) -> None:
    """`UserError` unless `weights` are exactly the expected; lists missing ones by public name.

    Args:
        public: names in the checkpoint.
        where: names the checkpoint in the message.
    """
    there = set(public)
    missing = [k for n in expected if n not in weights for k in keys.public(n) if k not in there]
    if missing:
        raise UserError(f"{where} does not fit its config: it {listed('lacks', missing)}")
    check_fit(shapes(weights), expected, where)


def fill(module: nn.Module, keys: KeyMap, public: Mapping[str, mx.array], *, where: object) -> None:
    """Put the weights of a public checkpoint into `module`, lazily.

    Raises:
        UserError: another network, or a weight that is missing, unknown or misshapen.
    """
    try:
        weights = keys.weights(public)
    except UserError as error:
        raise UserError(f"{where} is another network: {error}") from None
    check_complete(keys, public, weights, shapes(module.parameters()), where=where)
    module.update(tree_unflatten(list(weights.items())))
