"""Captions in text files and JSON."""

import json
from collections.abc import Mapping
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


def text_columns(values: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a JSON object, the main caption first; "" if it has none."""
    texts = {name: one_line(text) for name, text in values.items() if isinstance(text, str)}
    main = next((name for name in FIRST if name in texts), FIRST[0])
    return {main: texts.pop(main, "")} | texts
