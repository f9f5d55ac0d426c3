"""The ASGI application: routes, and the answer to each."""

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from apps.server.access import Guard
from apps.server.errors import RequestError
from apps.server.jobs import Busy, Drawing, Jobs, PictureStore
from apps.server.models import Served, find_served
from apps.server.request import (
    FORMATS,
    ImageRequest,
    Limits,
    backgrounds,
    parse_form,
    parse_request,
)
from apps.server.responses import Stream, error_response, server_event, unless_gone
from apps.server.uploads import Uploads, check_length, too_large
from apps.worker.messages import Failed, Finished, Notice, Picture, Progress
from mlx_snapgen._version import __version__
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.reading import parse_json
from mlx_snapgen.settings import trained_sizes

MAX_BODY = 64 << 10
BODY_SECONDS = 10.0
"""How long a client may take to send its request."""

_log = logging.getLogger("uvicorn.error")


class Server:
    """The routes and their state.

    Args:
        jobs: the queue.
        models: by the names that clients may use, the default first.
        limits: of one request.
        url_lifetime: seconds that a picture can be fetched by its address.
    """

    def __init__(
        self,
        jobs: Jobs,
        models: Mapping[str, Served],
        *,
        limits: Limits,
        url_lifetime: float = 3600,
    ):
        self.jobs, self.models, self.limits = jobs, models, limits
        self._pictures = PictureStore(url_lifetime)
        # One more than allowed, which `parse_form` refuses by name, and a mask.
        self._uploads = Uploads(limits.max_images + 2)
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
        given = request.path_params["name"]
        name = find_served(self.models, given)
        if name is None:
            message = f"no model '{given[:50]}', known: {', '.join(self.models)}"
            raise RequestError(message, 404, param="model", code="model_not_found")
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        config = model.config
        usual, few_step = config.sampler_for(few_step=False), config.few_step
        # The default first.
        modes = [usual] if few_step is None or few_step == usual else [few_step, usual]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "mlx_snapgen",
            "root": model.name,
            "size": "{1}x{0}".format(*config.image_size),
            "sizes": ["{1}x{0}".format(*size) for size in trained_sizes(config)],
            "any_size": config.abilities().any_size,
            "size_multiple_of": config.size_unit,
            "max_pixels": self.limits.pixels(config),
            "output_formats": list(FORMATS),
            "background": backgrounds(config),
            "modes": [
                {
                    "few_step": mode == few_step,
                    "steps": mode.num_inference_steps,
                    "guidance": mode.guidance_scale,
                    "abilities": _abilities(config, mode == few_step),
                }
                for mode in modes
            ],
        }

    async def picture(self, request: Request) -> Response:
        """`GET /images/{token}.{kind}`: a picture of a response of kind `url`."""
        token, kind = (request.path_params[name] for name in ("token", "kind"))
        data = self._pictures.get(f"{token}.{kind}")
        if data is None:
            raise RequestError("no such picture, or it has expired", 404)
        return Response(data, media_type=f"image/{kind}")

    async def generate(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        values = await _read_json(request)
        wanted = parse_request(values, self.models, self.limits)
        with contextlib.ExitStack() as ending:
            return await self._draw(request, wanted, ending=ending, name="image_generation")

    async def edit(self, request: Request) -> Response:
        """`POST /v1/images/edits`."""
        return await self._draw_form(request, is_variation=False)

    async def vary(self, request: Request) -> Response:
        """`POST /v1/images/variations`."""
        return await self._draw_form(request, is_variation=True)

    async def _draw_form(self, request: Request, *, is_variation: bool) -> Response:
        with contextlib.ExitStack() as ending:
            form = await self._uploads.read(request, ending)
            # It reads files.
            wanted = await asyncio.to_thread(
                parse_form, form, self.models, self.limits, is_variation=is_variation
            )
            name = "image_variation" if is_variation else "image_edit"
            return await self._draw(request, wanted, ending=ending, name=name)

    async def _draw(
        self, request: Request, wanted: ImageRequest, *, ending: contextlib.ExitStack, name: str
    ) -> Response:
        """Draw what is wanted.

        Args:
            ending: what is to be done when the request has ended.
            name: of the events of a stream.
        """
        try:
            drawing = self.jobs.submit(wanted.job)
        except Busy as busy:
            headers = {"Retry-After": str(busy.retry_after)}
            raise RequestError(str(busy), 429, code="queue_full", headers=headers) from None
        ending.callback(self.jobs.cancel, drawing)
        if wanted.stream:
            return Stream(self._events(wanted, drawing, name=name), ending.pop_all())
        return await unless_gone(request.receive, self._answer(request, wanted, drawing=drawing))

    async def _answer(
        self, request: Request, wanted: ImageRequest, *, drawing: Drawing
    ) -> Response:
        data, notices, shape = [], [*wanted.notices], {}
        while not isinstance(event := await drawing.get(), Finished):
            if isinstance(event, Failed):
                raise _failure(wanted, event)
            if isinstance(event, Notice):
                notices.append(_notice(wanted, event))
            elif isinstance(event, Picture):
                shape = _shape(wanted, event)
                if wanted.as_url:
                    token, kind = secrets.token_urlsafe(16), shape["output_format"]
                    self._pictures.add(f"{token}.{kind}", event.file)
                    shown = {"url": str(request.url_for("picture", token=token, kind=kind))}
                else:
                    shown = {"b64_json": base64.b64encode(event.file).decode()}
                data.append(shown | {"seed": event.metadata["seed"]})
        body = {"created": int(time.time()), "data": data, **shape}
        return JSONResponse(body | ({"notices": notices} if notices else {}))

    async def _events(
        self, wanted: ImageRequest, drawing: Drawing, *, name: str
    ) -> AsyncIterator[bytes]:
        """Server-sent events, named as in OpenAI's image streaming."""
        # Of each picture; those of a batch take turns.
        partial: Counter[int] = Counter()
        notices = [*wanted.notices]
        while not isinstance(event := await drawing.get(), Finished):
            if isinstance(event, Failed):
                raise _failure(wanted, event)
            if isinstance(event, Notice):
                notices.append(_notice(wanted, event))
            if not isinstance(event, Progress | Picture):
                continue
            extra = {"created_at": int(time.time()), "quality": "auto", **_shape(wanted, event)}
            if isinstance(event, Picture):
                extra |= {"seed": event.metadata["seed"], "image": event.image}
                extra |= {"notices": notices} if notices else {}
                yield _event(f"{name}.completed", event.file, **extra)
            elif event.preview is not None:
                extra |= {"partial_image_index": partial[event.image], "step": event.index + 1}
                extra |= {"steps": event.num_steps, "seed": event.seed, "image": event.image}
                partial[event.image] += 1
                yield _event(f"{name}.partial_image", event.preview, **extra)


def _abilities(config: Description, few_step: bool) -> dict[str, bool]:
    can = config.abilities(few_step=few_step)
    return {
        "guidance": can.guidance,
        "negative_prompt": can.guidance,
        "attention_modulation": can.attention_modulation,
        "image": True,
        "mask": True,
        "reference_images": can.edit,
        "batches": can.batches,
    }


def _notice(wanted: ImageRequest, event: Notice) -> str:
    # A client has no command line.
    text = event.text.removesuffix("; --vocabulary lists all words")
    return wanted.form.without_paths(text)


def _shape(wanted: ImageRequest, event: Progress | Picture) -> dict[str, str]:
    form = wanted.job.file_format
    assert form is not None
    size, background = "{}x{}".format(*event.size), "opaque" if form.opaque else "transparent"
    return {"size": size, "output_format": form.kind, "background": background}


def _event(name: str, file: bytes, **extra: Any) -> bytes:
    data = {"type": name, "b64_json": base64.b64encode(file).decode(), **extra}
    return server_event(name, data)


def _failure(wanted: ImageRequest, event: Failed) -> RequestError:
    if event.internal:
        _log.error("%s", "\n".join(filter(None, (event.message, event.details))))
        message = "the model cannot be loaded or drawn with: the reason is in the server's log"
        return RequestError(message, 500)
    message = wanted.form.without_paths(event.message)
    status = 400 if event.details is None else 500
    return RequestError(message, status, param=wanted.form.param(event.message))


async def _read_json(request: Request) -> Any:
    # Web pages can make a browser send forms or plain text to this machine, but not JSON.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("send JSON, with Content-Type: application/json", 415)
    check_length(request, MAX_BODY, what="body")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_large(MAX_BODY, "body")
    except TimeoutError:
        raise RequestError("the body took too long to arrive", 408) from None
    try:
        return parse_json(bytes(body), "the body")
    except UserError as error:
        raise RequestError(f"{error}: send valid JSON") from None


def create_app(server: Server, api_key: str | None, *, origins: Collection[str] = ()) -> ASGIApp:
    """The application; arguments are those of `Guard`.

    Pictures by `url` need no key, because their addresses cannot be guessed.
    """

    async def refuse(request: Request, error: Any) -> Response:
        return error_response(error)

    async def failed(request: Request, error: Any) -> Response:
        # uvicorn prints the traceback.
        return error_response(RequestError("the server failed: the reason is in its log", 500))

    async def unknown(request: Request, error: Any) -> Response:
        message, path = error.detail, request.url.path
        if error.status_code == 404:
            message = f"nothing at {path[:80]}: the API is under /v1, such as /v1/models"
        elif error.status_code == 405:
            message = f"{path[:80]} does not take {request.method}"
        return error_response(RequestError(message, error.status_code, headers=error.headers))

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.get_model),
        Route("/v1/images/generations", server.generate, methods=["POST"]),
        Route("/v1/images/edits", server.edit, methods=["POST"]),
        Route("/v1/images/variations", server.vary, methods=["POST"]),
        Route("/images/{token}.{kind}", server.picture, name="picture"),
    ]
    handlers: dict[Any, Callable[[Request, Exception], Awaitable[Response]]] = {
        RequestError: refuse,
        404: unknown,
        405: unknown,
        500: failed,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, api_key, origins=origins)
