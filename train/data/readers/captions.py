"""Captions in text files and JSON."""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

FIRST = ("text", "caption")
"""Columns of the main caption, in order of preference."""


def one_line(text: str) -> str:
    """`text` with single spaces, without what UTF-8 cannot hold."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def decode_text(data: bytes) -> str:
    """The caption in a text file; `UnicodeDecodeError` if it is not UTF-8."""
    return one_line(data.decode("utf-8-sig"))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object with a picture's captions; `ValueError` if it is none.

    Its other columns may have what is no JSON, such as NaN.
    """
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError("no object")
    return values


def by_preference(names: Iterable[str]) -> list[str]:
    """Columns of captions: those of `FIRST`, others named like them, and the rest in order."""
    names = list(names)
    main = [name for name in FIRST if name in names]
    main += [name for name in names if any(word in name.lower() for word in FIRST)]
    return list(dict.fromkeys([*main, *names]))


def default_column(objects: Iterable[Mapping[str, Any]]) -> str:
    """The column of the main caption in records that have none of `FIRST`.

    The first of the file's records that has texts decides, so that all have the same column.
    """
    for values in objects:
        if any(name in values for name in FIRST):
            break
        if texts := [name for name, text in values.items() if isinstance(text, str)]:
            return by_preference(texts)[0]
    return FIRST[0]


def text_columns(
    values: Mapping[str, Any], default: Callable[[], str] = lambda: FIRST[0]
) -> dict[str, str]:
    """The texts of a JSON object, the main caption first; "" if it has none.

    Args:
        default: the column of the main caption if it is none of `FIRST`.
    """
    texts = {name: one_line(text) for name, text in values.items() if isinstance(text, str)}
    named = any(name in values for name in FIRST)
    main = next((name for name in FIRST if name in texts), FIRST[0] if named else default())
    return {main: texts.pop(main, "")} | texts
