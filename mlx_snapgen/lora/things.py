"""New things in LoRA files: what they are called, and their rows of a decoder's table.

The transformer learns the codes of a thing, which semantic latents have spare (see
`mlx_snapgen.semantics`), and the decoder looks up how it looks. The rows do not change with the
LoRA's weight.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.errors import UserError, one_line, plural
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.reading import parse_json
from mlx_snapgen.semantics import SemanticConfig

KEY = "autoencoder.decoder.table.things.weight"
"""Of the rows, in a LoRA file."""
HEADER = "thing"
LARGEST = 1e4
"""Of the rows; an encoder's are below 100."""


@dataclass(frozen=True)
class Thing:
    """A thing that a LoRA teaches.

    Attributes:
        name, plural: the words for it.
        codes: numbers of its codes, one for each look.
        things, sides: see `SemanticConfig`, of the model that it is for.
    """

    name: str
    plural: str
    codes: tuple[int, ...]
    things: int
    sides: tuple[int, ...]

    def __post_init__(self):
        if not (self.name and self.plural and self.codes):
            raise UserError("a thing has a name, a plural and codes")
        SemanticConfig(self.things, self.sides, own=self.codes)

    @property
    def words(self) -> list[str]:
        """The names, and the words in them."""
        names = self.name, self.plural
        return list(dict.fromkeys((*names, *(word for name in names for word in name.split()))))

    def header(self) -> dict[str, str]:
        """The part of a LoRA file's header."""
        return {HEADER: json.dumps(to_dict(self))}


def read_thing(path: str | Path, header: Mapping[str, str]) -> Thing | None:
    """The thing in the header of a LoRA file; `UserError` for a damaged one."""
    if HEADER not in header:
        return None
    try:
        return from_dict(Thing, parse_json(header[HEADER], path))
    except UserError as error:
        raise UserError(f"{path} has a damaged header ({error}): get it again") from None


def check_thing(path: str | Path, thing: Thing, semantics: SemanticConfig | None) -> None:
    """`UserError` unless a model with these semantic latents can learn the thing of a LoRA file."""
    name = one_line(thing.name, 40)
    if semantics is None:
        raise UserError(
            f"{path} teaches the thing '{name}', which takes a model with semantic latents"
        )
    if (thing.things, thing.sides) != (semantics.things, semantics.sides):
        raise UserError(
            f"{path} is of a model that knows {_described(thing)}, this one knows "
            f"{_described(semantics)}: train the LoRA again for this model"
        )
    if {*thing.codes} & {*semantics.own}:
        raise UserError(
            f"{path}: '{name}' has a code of another thing of this model or LoRA: train it again "
            "with another --seed"
        )


def _described(known: Thing | SemanticConfig) -> str:
    return f"{plural(known.things, 'thing')} in {plural(len(known.sides), 'size')}"


def check_rows(path: str | Path, thing: Thing, rows: mx.array | None, *, channels: int) -> mx.array:
    """The rows of a LoRA file's thing, float32; `UserError` if they do not fit.

    Args:
        channels: of the decoder's latents of appearance.
    """
    expected = len(thing.codes) * sum(side**2 for side in thing.sides), channels
    if rows is None or rows.shape != expected or not mx.issubdtype(rows.dtype, mx.floating):
        found = "missing" if rows is None else f"{rows.shape} in {rows.dtype}"
        raise UserError(f"{path} does not fit this model: {KEY} is {found}, not {expected}")
    rows = rows.astype(mx.float32)
    if not mx.all(mx.abs(rows) <= LARGEST).item():  # not a number is not
        raise UserError(
            f"{path} is damaged: {KEY} has numbers that are not finite or larger than {LARGEST:g}"
        )
    return rows


def add_thing(autoencoder: Any, thing: Thing, rows: mx.array) -> None:
    """Give an autoencoder's decoder the rows (looks * places, A) of a thing, in place."""
    own, before = autoencoder.own_things()
    autoencoder.set_own_things((*own, *thing.codes), mx.concatenate([before, rows]))


def remove_things(autoencoder: Any, codes: Sequence[int]) -> None:
    """Undo `add_thing`, of the things with these codes."""
    own, rows = autoencoder.own_things()
    if not {*own} & {*codes}:
        return
    kept = [k for k, code in enumerate(own) if code not in codes]
    rows = rows.reshape(len(own), -1, rows.shape[-1])[mx.array(kept, mx.int32)]
    autoencoder.set_own_things(tuple(own[k] for k in kept), rows.flatten(0, 1))
