"""What a client did wrong, as OpenAI's API says it."""

from collections.abc import Mapping
from typing import Any


class RequestError(Exception):
    """A request that cannot be served.

    Args:
        message: one line for the client.
        status: HTTP status.
        param: name of the wrong parameter.
        code: OpenAI's name of the error.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message if len(message) <= 300 else message[:299] + "…")
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
