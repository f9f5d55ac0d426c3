"""uvicorn with time limits for slow clients."""

import asyncio
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from apps.server.errors import RequestError
from apps.server.responses import error_response

GRACE = 30
"""Seconds that open requests may take after a signal to end."""
CONNECTIONS = 256
"""Open at once; further ones are answered 503."""
KEEP_ALIVE = 5
"""Seconds until a connection without another request is closed."""
HEAD_SECONDS = 10.0
"""How long a connection may wait for the head of a request."""
SEND_SECONDS = 30.0
"""How long a response may stay unread; then the connection is dropped."""
TICK = 1.0
DRAIN_RATE, MAX_DRAINED = 64 << 10, 80 << 20
"""Bytes in `TICK` seconds of a body that goes on after the response, so that the client reads the
response when it has sent all; and of all of them."""


class Connection(H11Protocol):
    """A connection that is closed if its client is too slow; uvicorn itself never closes it.

    Without this, clients that open connections and send nothing would block all others. uvicorn's
    own errors are JSON, as those of the application.
    """

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._all, self.app = self.app, self._unless_full
        # uvicorn's response would be text.
        self.limit_concurrency = None

    async def _unless_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        # This task is one of them.
        if len(self.connections) < CONNECTIONS and len(self.tasks) <= CONNECTIONS:
            return await self._all(scope, receive, send)
        headers = {"Retry-After": "10", "Connection": "close"}
        error = RequestError("too many connections at once", 503, headers=headers)
        await error_response(error)(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._socket, self._is_draining = transport, False
        super().connection_made(_ClosedBy(transport, self.close))
        self._unsent = self._received = self._drained = 0
        self._waited = self._stuck = 0.0
        self._ticking = self.loop.call_later(TICK, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ticking.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a broken request, whose body may break after the application has answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(RequestError(msg).body()).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            head = h11.Response(status_code=400, headers=[*headers.items()], reason="Bad Request")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if self.cycle is not None:
            # h11 sends nothing after this.
            self.cycle.disconnected = True

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if not self._is_draining:
            super().data_received(data)

    def close(self) -> None:
        """Close the connection. The rest of a body is read first: the client, which still sends it,
        would get a reset instead of the response."""
        is_partial = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self._socket.is_closing() or self._is_draining or not is_partial:
            return self._socket.close()
        self._is_draining, self._waited, self._drained = True, 0.0, 0
        try:
            self._socket.write_eof()
        except OSError:
            return self._socket.close()
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._waited, self._drained = 0.0, 0
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        # uvicorn does not expect a connection that was closed to go on.
        if not self._is_draining:
            super().timeout_keep_alive_handler()

    def _tick(self) -> None:
        # Ticks are counted, not seconds: time in which this process did not run does not count.
        waiting = self._is_draining or self.cycle is None or self.cycle.response_complete
        received, self._received = self._received, 0
        self._drained += received
        if not waiting:
            self._waited = 0.0
        elif received < DRAIN_RATE or self._drained > MAX_DRAINED:
            self._waited += TICK
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        self._stuck = self._stuck + TICK if 0 < self._unsent == before else 0.0
        if self._waited >= HEAD_SECONDS:
            self._socket.close()
        # Closing waits until everything is sent.
        if self._stuck >= SEND_SECONDS:
            self._socket.abort()
        self._ticking = self.loop.call_later(TICK, self._tick)


class _ClosedBy(asyncio.Transport):
    """A transport with another way to close it."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]):
        super().__init__()
        self._transport, self.close = transport, close

    def __getattribute__(self, name: str) -> Any:
        if name in ("_transport", "close"):
            return super().__getattribute__(name)
        return getattr(self._transport, name)


class _Server(uvicorn.Server):
    """Does not handle signals: uvicorn's handling kills the process before it cleans up."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server of `app`; its `serve` takes the sockets."""
    return _Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        )
    )
