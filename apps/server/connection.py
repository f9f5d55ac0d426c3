"""uvicorn with time limits for slow clients."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

GRACE = 30
"""Seconds that open requests may take after a signal to end."""
CONNECTIONS = 256
"""Open at once; further ones are answered 503."""
HEAD_SECONDS = 10.0
"""How long a connection may wait for the head of a request."""
SEND_SECONDS = 30.0
"""How long a response may stay unread; then the connection is dropped."""
TICK = 1.0


class Connection(H11Protocol):
    """A connection that is closed if its client is too slow; uvicorn itself never closes it.

    Without this, clients that open connections and send nothing would block all others.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._unsent = 0
        self._waited = self._stuck = 0.0
        self._ticking = self.loop.call_later(TICK, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ticking.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer a broken request, whose body may break after the application has answered."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        if self.cycle is not None:
            # h11 sends nothing after this.
            self.cycle.disconnected = True

    def on_response_complete(self) -> None:
        self._waited = 0.0
        super().on_response_complete()

    def _tick(self) -> None:
        # Ticks are counted, not seconds: time in which this process did not run does not count.
        waiting = self.cycle is None or self.cycle.response_complete
        self._waited = self._waited + TICK if waiting else 0.0
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        self._stuck = self._stuck + TICK if 0 < self._unsent == before else 0.0
        if self._waited >= HEAD_SECONDS:
            self.transport.close()
        # Closing waits until everything is sent.
        if self._stuck >= SEND_SECONDS:
            self.transport.abort()
        self._ticking = self.loop.call_later(TICK, self._tick)


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
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=GRACE,
        )
    )
