"""The parameters of a request, by name and type."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

from apps.server.errors import RequestError
from apps.server.models import Served, find_served
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.reading import parse_json

IGNORED = {"input_fidelity", "moderation", "quality", "safety_identifier", "style", "user"}
"""Parameters of OpenAI's models without effect here."""


class Reader:
    """Values by name and type; those of a form are texts."""

    def __init__(self, values: Mapping[str, Any], *, is_form: bool = False):
        self._values, self._is_form = values, is_form
        self._known = set(IGNORED)

    def check_all_read(self) -> None:
        """`RequestError` for a value that was not read, or is ignored and of a wrong type."""
        for name in sorted(IGNORED):
            self._get(name, str, what="a string")
        for name in self._values:
            if name not in self._known:
                name = name[:50]
                if name in ("strength", "fit") and not self._is_form:
                    message = f"{name} belongs to edits: send a picture to /v1/images/edits"
                    raise RequestError(message, param=name)
                hint = nearest(name, self._known)
                raise RequestError(f"unknown parameter '{name}'{hint}", param=name)

    def _get(self, name: str, kinds: type | tuple[type, ...], *, what: str) -> Any:
        self._known.add(name)
        value = self._values.get(name)
        if self._is_form and value is not None and kinds is not str:
            with contextlib.suppress(UserError):
                value = parse_json(value, name)
        wrong_bool = isinstance(value, bool) and kinds is not bool
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise RequestError(f"{name} must be {what}", param=name)
        return value

    def text(self, name: str, most: int) -> str | None:
        value = self._get(name, str, what="a string")
        if value is not None and len(value) > most:
            raise RequestError(f"{name} is longer than {most} characters", param=name)
        return value

    def model(self, models: Mapping[str, Served]) -> str:
        """See `find_served`; without a name, the first model."""
        name = self._get("model", str, what="a string")
        if name is not None and (found := find_served(models, name)) is not None:
            return found
        return self.choice("model", list(models))

    def choice(self, name: str, known: list[str]) -> str:
        """One of `known`, whose first is the default."""
        value = self._get(name, str, what="a string")
        if value is not None and value not in known:
            status, code = (404, "model_not_found") if name == "model" else (400, None)
            listed = ", ".join(known)
            message = f"no {name} '{value[:50]}', known: {listed}"
            raise RequestError(message, status, param=name, code=code)
        return known[0] if value is None else value

    def integer(self, name: str, *, least: int, most: int, hint: str = "") -> int | None:
        value = self._get(name, (int, float), what="a whole number")
        if isinstance(value, float):
            # Some clients write 1 as 1.0.
            if not value.is_integer():
                raise RequestError(f"{name} must be a whole number, such as 1", param=name)
            value = int(value)
        if value is not None and not least <= value <= most:
            raise RequestError(f"{name} must be from {least} to {most}{hint}", param=name)
        return value

    def number(self, name: str, *, least: float = -1e6) -> float | None:
        value = self._get(name, (int, float), what="a number")
        # An integer may be too long for a float, too.
        if value is not None and not (abs(value) <= 1e6 and math.isfinite(value)):
            raise RequestError(f"{name} must be a finite number, at most 1e6", param=name)
        if value is not None and value < least:
            raise RequestError(f"{name} must be at least {least:g}, got {value:g}", param=name)
        return value

    def boolean(self, name: str) -> bool | None:
        return self._get(name, bool, what="true or false")
