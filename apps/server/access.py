"""Who may use the server: clients with its key or, without one, this machine and chosen pages."""

import asyncio
import contextlib
import hmac
import re
import urllib.parse
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.server.errors import RequestError
from apps.server.request import is_loopback
from apps.server.responses import Gone, error_response


class Guard:
    """Checks the key or the host of every request, and ends those whose client has disconnected.

    Args:
        api_key: None allows requests whose Host and Origin are loopback names, so that a web page
            cannot reach the server, also not through its own host name (DNS rebinding).
        origins: of web pages that may use the server all the same, and read its responses (CORS).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, *, origins: Collection[str]):
        self._app, self._key, self._origins = app, api_key, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        headers = Headers(scope=scope)
        refusal, started = self._refusal(scope, headers), False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and self._origins:
                message = {**message, "headers": [*message["headers"], *self._cors(headers)]}
            await send(message)

        try:
            with contextlib.suppress(Gone, ClientDisconnect):
                await (refusal or self._app)(scope, receive, send_on)
        except asyncio.CancelledError:
            # The server ends. The task ends here, without the traceback that uvicorn would print.
            if not started:
                await error_response(RequestError("the server ends", 503))(scope, receive, send_on)

    def _cors(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        found = [(b"vary", b"Origin")]
        if (origin := headers.get("origin")) in self._origins:
            found.append((b"access-control-allow-origin", origin.encode()))
            found.append((b"access-control-expose-headers", b"Retry-After"))
        return found

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        """What to answer instead of the application; None if the request may pass."""
        origin = headers.get("origin")
        is_preflight = (
            scope["method"] == "OPTIONS"
            and origin in self._origins
            and "access-control-request-method" in headers
        )
        if self._key is None:
            host = headers.get("host", "")
            if not is_loopback(_hostname(host)):
                message = (
                    f"without an API key only this machine can connect, not as '{host[:80]}': use "
                    "127.0.0.1, or start the server with --api-key"
                )
                return error_response(RequestError(message, 403))
            if not (origin is None or origin in self._origins or is_loopback(_hostname(origin))):
                message = (
                    "without an API key, web pages of other machines cannot use this server: start "
                    "it with --api-key or --allow-origin"
                )
                return error_response(RequestError(message, 403))
        if is_preflight:
            # A browser sends it without the key.
            return _preflight(headers)
        if self._key is not None and scope["path"].startswith("/v1/"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self._key.encode())
            if kind.lower() != "bearer" or not right:
                error = RequestError("no valid API key", 401, code="invalid_api_key")
                return error_response(error)
        return None


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks whether a page may send a request (CORS)."""
    asked = headers.get("access-control-request-headers", "")
    # Clients add headers of their own, so all are allowed.
    allowed = asked if re.fullmatch(r"[\w\-, ]{1,2000}", asked, re.ASCII) else "Authorization"
    found = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": allowed,
        "Access-Control-Max-Age": "600",
    }
    if headers.get("access-control-request-private-network") == "true":
        found["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=found)


def _hostname(where: str) -> str:
    """The host of "host:port" or "scheme://host:port"; "" if there is none."""
    try:
        return urllib.parse.urlsplit(where if "://" in where else f"//{where}").hostname or ""
    except ValueError:
        return ""
