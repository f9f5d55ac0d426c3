"""The ASGI application: routes, streaming, and access control."""

import asyncio
import base64
import contextlib
import hmac
import json
import secrets
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apps.server.jobs import Busy, Drawing, Jobs, PictureStore
from apps.server.request import ImageRequest, Limits, RequestError, is_loopback, parse_request
from apps.worker.messages import Failed, Finished, Notice, Picture, Progress
from mlx_snapgen._version import __version__
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import parse_json
from mlx_snapgen.settings import ModelChoice

MAX_BODY = 64 << 10
BODY_SECONDS = 10.0
"""How long a client may take to send its request."""
PREFIX = "image_generation."


class Server:
    """The routes and their state.

    Args:
        jobs: the queue.
        models: names that clients may use -> the model to load, the default first.
        config: the model's.
        limits: of one request.
        url_lifetime: seconds that a picture can be fetched by its address.
    """

    def __init__(
        self,
        jobs: Jobs,
        models: Mapping[str, ModelChoice],
        *,
        config: Description,
        limits: Limits,
        url_lifetime: float = 3600,
    ):
        self.jobs, self.models, self.config, self.limits = jobs, models, config, limits
        self._pictures = PictureStore(url_lifetime)
        self._created = int(time.time())

    async def health(self, request: Request) -> Response:
        """`GET /health`; status 503 while the worker makes no progress."""
        stalled = self.jobs.stalled
        return JSONResponse(
            {
                "status": "stalled" if stalled else "ok",
                "version": __version__,
                "model": next(iter(self.models)),
                "open_requests": len(self.jobs),
                "served": self.jobs.served,
                "worker_restarts": self.jobs.restarts,
            },
            503 if stalled else 200,
        )

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model(m) for m in self.models]})

    async def get_model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`."""
        name = request.path_params["name"]
        if name not in self.models:
            message = f"no model '{name[:50]}', known: {', '.join(self.models)}"
            raise RequestError(message, 404, param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "mlx_snapgen"}

    async def picture(self, request: Request) -> Response:
        """`GET /images/{token}.png`: a picture of a response of kind `url`."""
        png = self._pictures.get(request.path_params["token"])
        if png is None:
            raise RequestError("no such picture, or it has expired", 404)
        return Response(png, media_type="image/png")

    async def generate(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        values = await _read_json(request)
        wanted = parse_request(values, self.models, config=self.config, limits=self.limits)
        try:
            drawing = self.jobs.submit(wanted.job)
        except Busy as busy:
            headers = {"Retry-After": str(busy.retry_after)}
            raise RequestError(str(busy), 429, code="queue_full", headers=headers) from None
        if wanted.stream:
            return _Stream(self.jobs, drawing, events=self._events(wanted, drawing))
        try:
            return await _unless_gone(
                request.receive, self._answer(request, wanted, drawing=drawing)
            )
        finally:
            self.jobs.cancel(drawing)

    async def _answer(
        self, request: Request, wanted: ImageRequest, *, drawing: Drawing
    ) -> Response:
        data, notices = [], []
        while not isinstance(event := await drawing.get(), Finished):
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Notice):
                notices.append(event.text)
            elif isinstance(event, Picture):
                if wanted.as_url:
                    token = secrets.token_urlsafe(16)
                    self._pictures.add(token, event.png)
                    shown = {"url": str(request.url_for("picture", token=token))}
                else:
                    shown = {"b64_json": base64.b64encode(event.png).decode()}
                data.append(shown | {"seed": event.metadata["seed"]})
        body = {"created": int(time.time()), "data": data, **_format(wanted)}
        return JSONResponse(body | ({"notices": notices} if notices else {}))

    async def _events(self, wanted: ImageRequest, drawing: Drawing) -> AsyncIterator[bytes]:
        """Server-sent events, named as in OpenAI's image streaming."""
        partial = 0
        while not isinstance(event := await drawing.get(), Finished):
            if isinstance(event, Failed):
                raise _failure(event)
            extra = {"created_at": int(time.time()), "quality": "auto", **_format(wanted)}
            if isinstance(event, Progress) and event.preview is not None:
                extra |= {"partial_image_index": partial, "step": event.index + 1}
                extra |= {"steps": event.num_steps, "seed": event.seed, "image": event.image}
                partial += 1
                yield _event("partial_image", event.preview, **extra)
            elif isinstance(event, Picture):
                partial = 0
                extra |= {"seed": event.metadata["seed"], "image": event.image}
                yield _event("completed", event.png, **extra)


def _format(wanted: ImageRequest) -> dict[str, str]:
    size = "{}x{}".format(*wanted.size)
    return {"size": size, "output_format": "png", "background": "opaque"}


def _event(name: str, png: bytes, **extra: Any) -> bytes:
    data = {"type": PREFIX + name, "b64_json": base64.b64encode(png).decode(), **extra}
    return f"event: {PREFIX}{name}\ndata: {json.dumps(data)}\n\n".encode()


def _failure(event: Failed) -> RequestError:
    return RequestError(event.message, 400 if event.details is None else 500)


async def _read_json(request: Request) -> Any:
    # Web pages can make a browser send forms or plain text to this machine, but not JSON.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("send JSON, with Content-Type: application/json", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise RequestError(f"the body is larger than {MAX_BODY} bytes", 413)
    except TimeoutError:
        raise RequestError("the body took too long to arrive", 408) from None
    try:
        return parse_json(bytes(body), "the body")
    except UserError as error:
        raise RequestError(f"{error}: send valid JSON") from None


class Gone(Exception):
    """The client has disconnected."""


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`; `Gone` as soon as the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watching, working = asyncio.ensure_future(watch()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


class _Stream(Response):
    """Sends each event at once. A failure before the first one is an ordinary error response."""

    def __init__(self, jobs: Jobs, drawing: Drawing, *, events: AsyncIterator[bytes]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._jobs, self._drawing, self._events = jobs, drawing, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(scope, receive, send))
        finally:
            self._jobs.cancel(self._drawing)

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._events, b"")
        except RequestError as error:
            return await _refuse(error)(scope, receive, send)
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except RequestError as error:
            text = f"event: error\ndata: {json.dumps(error.body())}\n\n".encode()
            await send({"type": "http.response.body", "body": text, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Guard:
    """Checks the key or the host of every request, and ends those whose client has disconnected.

    Args:
        api_key: None allows requests whose Host and Origin are loopback names, so that a web page
            cannot reach the server, also not through its own host name (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app, self._key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        refusal, started = self._refusal(scope), False

        async def send_on(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            with contextlib.suppress(Gone, ClientDisconnect):
                await (refusal or self._app)(scope, receive, send_on)
        except asyncio.CancelledError:
            # The server ends. The task ends here, without the traceback that uvicorn would print.
            if not started:
                await _refuse(RequestError("the server ends", 503))(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if not is_loopback(_hostname(host)):
                message = (
                    f"without an API key only this machine can connect, not as '{host[:80]}': use "
                    "127.0.0.1, or start the server with --api-key"
                )
                return _refuse(RequestError(message, 403))
            origin = headers.get(b"origin")
            if origin is not None and not is_loopback(_hostname(origin.decode("latin-1"))):
                message = (
                    "without an API key, web pages of other machines cannot use this server: start "
                    "it with --api-key"
                )
                return _refuse(RequestError(message, 403))
        elif scope["path"].startswith("/v1/"):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(key.strip(), self._key.encode())
            if kind.lower() != b"bearer" or not right:
                error = RequestError("no valid API key", 401, code="invalid_api_key")
                return _refuse(error)
        return None


def _hostname(where: str) -> str:
    """The host of "host:port" or "scheme://host:port"; "" if there is none."""
    try:
        return urllib.parse.urlsplit(where if "://" in where else f"//{where}").hostname or ""
    except ValueError:
        return ""


def _refuse(error: RequestError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


def create_app(server: Server, api_key: str | None) -> ASGIApp:
    """The application; pictures by `url` need no key, because their addresses cannot be guessed."""

    async def refuse(request: Request, error: Any) -> Response:
        return _refuse(error)

    async def unknown(request: Request, error: Any) -> Response:
        message, path = error.detail, request.url.path
        if error.status_code == 404:
            message = f"nothing at {path[:80]}: the API is under /v1, such as /v1/models"
        elif error.status_code == 405:
            message = f"{path[:80]} does not take {request.method}"
        return _refuse(RequestError(message, error.status_code, headers=error.headers))

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name}", server.get_model),
        Route("/v1/images/generations", server.generate, methods=["POST"]),
        Route("/images/{token}.png", server.picture, name="picture"),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        RequestError: refuse,
        404: unknown,
        405: unknown,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), api_key)
