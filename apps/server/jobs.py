"""The worker process for asyncio: a bounded queue, and the events of each request."""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from apps.worker.client import Worker
from apps.worker.messages import Event, Failed, Finished, Job, Loaded, Progress

MAX_UNREAD = 8 << 20
"""Bytes of unread previews per client."""
TICK = 1
"""Seconds between two looks at the worker."""


class Busy(Exception):
    """The queue is full; `retry_after` in seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many requests wait: try again in {retry_after} s")
        self.retry_after = retry_after


class Drawing:
    """The events of one request. Beyond `MAX_UNREAD` a new step replaces the last one."""

    def __init__(self, number: int):
        self.number = number
        self.started: float | None = None
        self.ended = False
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event; only in the event loop's thread."""
        self.ended = isinstance(event, Finished | Failed)
        if isinstance(event, Progress) and event.preview is None:
            return
        last = self._events[-1] if self._events else None
        if isinstance(event, Progress) and isinstance(last, Progress) and self._is_full():
            self._events[-1] = event
        else:
            self._events.append(event)
        self._arrived.set()

    def _is_full(self) -> bool:
        unread = (e.preview or b"" for e in self._events if isinstance(e, Progress))
        return sum(map(len, unread)) > MAX_UNREAD

    async def get(self) -> Event:
        """The next event."""
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()


class Jobs:
    """Draws one job at a time, with at most `waiting` in the queue; create it in the event loop.

    Args:
        waiting: length of the queue.
        timeout: seconds without an event of the worker after which `watch` replaces it.
        worker: arguments of `Worker`.
    """

    def __init__(self, waiting: int, *, timeout: int = 300, **worker: Any):
        self._loop = asyncio.get_running_loop()
        self._most = waiting + 1
        self._timeout = timeout
        self._quiet = 0
        self._open: dict[int, Drawing] = {}
        self._seconds = 1.0
        self.served = 0
        self.worker = Worker(self._deliver, **worker)

    def __len__(self) -> int:
        """Jobs drawn or waiting."""
        return len(self._open)

    def submit(self, job: Job) -> Drawing:
        """Queue a job; `Busy` when the queue is full."""
        if len(self._open) >= self._most:
            raise Busy(min(600, max(1, math.ceil(self._seconds * len(self._open)))))
        if not self._open:
            self._quiet = 0
        drawing = Drawing(self.worker.submit(job))
        self._open[drawing.number] = drawing
        return drawing

    def cancel(self, drawing: Drawing) -> None:
        """Stop a job. It keeps its place in the queue until the worker has stopped it."""
        if not drawing.ended:
            self.worker.cancel(drawing.number)

    @property
    def restarts(self) -> int:
        """How often a worker that hung or died was replaced, or will be by the next job."""
        return self.worker.ends

    @property
    def stalled(self) -> bool:
        """Whether half of the timeout has passed without an event of an open job."""
        return 2 * self._quiet > self._timeout

    async def watch(self) -> None:
        """Replace a worker that hangs; runs until it is canceled."""
        while True:
            await asyncio.sleep(TICK)
            # Ticks are counted, not seconds: time in which this process did not run does not count.
            self._quiet = self._quiet + TICK if self._open else 0
            if self._quiet > self._timeout:
                self._quiet = 0
                message = f"the drawing process made no step in {self._timeout} s (--step-timeout)"
                await asyncio.to_thread(self.worker.replace, message)

    async def close(self) -> None:
        """End the worker."""
        await asyncio.to_thread(self.worker.close)

    def _deliver(self, event: Event) -> None:
        # RuntimeError: the loop is closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._dispatch, event)

    def _dispatch(self, event: Event) -> None:
        drawing = self._open.get(event.job)
        if drawing is None:
            return
        self._quiet = 0
        if isinstance(event, Loaded):
            drawing.started = time.monotonic()
        if isinstance(event, Finished | Failed):
            del self._open[event.job]
            self.served += 1
            if drawing.started is not None:
                spent = time.monotonic() - drawing.started
                self._seconds += 0.3 * (spent - self._seconds)
        drawing.put(event)


class PictureStore:
    """Pictures to be fetched by address: the latest ones, at most `limit` bytes.

    Args:
        lifetime: seconds until a picture is forgotten.
        clock: seconds.
    """

    def __init__(
        self,
        lifetime: float,
        limit: int = 64 << 20,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._lifetime, self._limit, self._clock, self._size = lifetime, limit, clock, 0
        self._pictures: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def add(self, name: str, data: bytes) -> None:
        self._forget()
        self._pictures[name] = self._clock() + self._lifetime, data
        self._size += len(data)
        while self._size > self._limit and len(self._pictures) > 1:
            self._drop_oldest()

    def get(self, name: str) -> bytes | None:
        self._forget()
        return self._pictures.get(name, (0.0, None))[1]

    def _forget(self) -> None:
        while self._pictures and next(iter(self._pictures.values()))[0] <= self._clock():
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._size -= len(self._pictures.popitem(last=False)[1][1])
