"""The caller's side of the worker process: submit jobs, get events, never wait for MLX.

The model runs in a process, not a thread (`apps.worker.engine`): it does not hold the caller's
interpreter lock, a crash (running out of GPU memory ends the whole process) becomes an event, and a
download stops at once. This side does not import mlx.
"""

import contextlib
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

from apps.worker.messages import Cancel, Event, Failed, Finished, Job

CACHE_LIMIT = 1 << 30
"""Bytes of freed arrays that MLX may keep for reuse while it draws."""


class Worker:
    """Starts the process, sends jobs and delivers events; safe to use from several threads.

    Args:
        deliver: called with each `Event`, in a separate thread. Every job submitted gets exactly
            one `Finished` or `Failed`, also when the process dies. A new process then draws the
            jobs that had no event yet; the first of them fails if that process dies, too.
        keep: number of loaded models that stay in memory; the latest ones are kept.
        memory: bytes that they may take together with the next picture; beyond, the least recently
            used are freed. None: three quarters of this machine's memory.
        unload_after: seconds after which a model that nobody uses is freed; None: never.
        cache_limit: see `CACHE_LIMIT`.
    """

    def __init__(
        self,
        deliver: Callable[[Event], None],
        *,
        keep: int = 1,
        memory: int | None = None,
        unload_after: float | None = None,
        cache_limit: int = CACHE_LIMIT,
    ):
        self._deliver = deliver
        self._settings = {"keep": keep, "memory": memory, "unload_after": unload_after}
        self._settings["cache_limit"] = cache_limit
        self._ids = itertools.count(1)
        self._lock = threading.RLock()
        self._process: Any = None
        self._latest: Any = None
        self._connection: Any = None
        self._reader: threading.Thread | None = None
        self._open: dict[int, Job] = {}
        self._cancelled: set[int] = set()
        # Jobs that had an event, or were the first when a process died: no other one draws them.
        self._begun: set[int] = set()
        self._closed = False
        self.ends = 0
        """How often the process has hung or ended by itself."""

    @property
    def pid(self) -> int | None:
        """ID of the process; None if there is none."""
        return self._process.pid if self._process is not None else None

    def submit(self, job: Job) -> int:
        """Queue a job behind those submitted before; starts the process if there is none."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker is closed")
            if self._process is None:
                self._start()
            number = next(self._ids)
            self._open[number] = job
            # If the process has just died, the reader detects it and starts another.
            with contextlib.suppress(OSError):
                self._connection.send((number, job))
            return number

    def cancel(self, job: int) -> None:
        """Stop a job after its current step; a job that has ended is not changed."""
        with self._lock:
            if job in self._open and self._process is not None:
                self._cancelled.add(job)
                with contextlib.suppress(OSError):
                    self._connection.send(Cancel(job))

    def interrupt(self) -> None:
        """Stop all work at once, also a download or a load, by ending the process.

        Open jobs end as cancelled; the next one starts a new process.
        """
        with self._lock:
            process, reader = self._process, self._reader
            stopped = self._forget(*self._open)
            self._process = None
            if process is not None:
                process.terminate()
        _reap(process, reader)
        for number in stopped:
            self._deliver(Finished(number, cancelled=True))

    def replace(self, message: str) -> None:
        """End a process that hangs, with the job that it draws; a new one draws the other jobs.

        Args:
            message: of the job's `Failed`.
        """
        with self._lock:
            process, reader = self._process, self._reader
            if process is None or not self._open or self._closed:
                return
            self.ends += 1
            process.kill()
            hung = next(iter(self._open))
            self._forget(hung)
            lost = self._restart()
        details = None if lost else "It was replaced by a new one."
        for number in (hung, *lost):
            self._deliver(Failed(number, message, details=details))
        _reap(process, reader)

    def kill(self) -> None:
        """End the process at once, also one that `close` waits for; there is no other after it."""
        with self._lock:
            self._closed = True
            if self._latest is not None:
                self._latest.kill()

    def close(self, timeout: float = 5.0) -> None:
        """End the process, by force after `timeout` seconds. Open jobs are dropped."""
        with self._lock:
            self._closed = True
            process, reader, self._process = self._process, self._reader, None
            self._open.clear()
            if process is not None:
                with contextlib.suppress(OSError):
                    self._connection.send(None)
        if process is not None:
            process.join(timeout)
        _reap(process, reader)

    def _restart(self) -> list[int]:
        """Give the open jobs to a new process. If none can start, they are lost and returned."""
        if not self._open:
            self._process = None
            return []
        try:
            self._start()
        except OSError:
            self._process = None
            return self._forget(*self._open)
        with contextlib.suppress(OSError):
            for number, job in self._open.items():
                self._connection.send((number, job))
            for number in self._cancelled:
                self._connection.send(Cancel(number))
        return []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs,),
            kwargs=self._settings,
            daemon=True,
        )
        process.start()
        theirs.close()
        self._process, self._latest, self._connection = process, process, ours
        self._reader = threading.Thread(target=self._read, args=(process, ours), daemon=True)
        self._reader.start()

    def _read(self, process: Any, connection: Any) -> None:
        with connection:
            while True:
                try:
                    event = connection.recv()
                except (EOFError, OSError):
                    break
                with self._lock:
                    if self._process is not process or event.job not in self._open:
                        continue  # closed or interrupted since
                    self._begun.add(event.job)
                    if isinstance(event, Finished | Failed):
                        self._forget(event.job)
                self._deliver(event)
        process.join()
        with self._lock:
            if self._process is not process:
                return
            self.ends += 1
            lost = self._forget(*(n for n in self._open if self._closed or n in self._begun))
            if not lost:
                # It died while it was idle, or of the first job.
                self._begun.update(list(self._open)[:1])
            lost += self._restart()
        for number in lost:
            message = f"the drawing process ended unexpectedly ({_ending(process.exitcode)})"
            hint = "It starts again with the next picture. A smaller size or width needs less."
            self._deliver(Failed(number, f"{message}: probably out of memory", details=hint))

    def _forget(self, *numbers: int) -> list[int]:
        """Take jobs out of the open ones; returns them."""
        for number in numbers:
            del self._open[number]
        self._cancelled.difference_update(numbers)
        self._begun.difference_update(numbers)
        return list(numbers)


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _reap(process: Any, reader: threading.Thread | None) -> None:
    if process is None:
        return
    if process.is_alive():
        process.terminate()
        process.join(2)
    if process.is_alive():
        process.kill()
        process.join()
    if reader is not None and reader is not threading.current_thread():
        reader.join(2)


def _serve(connection: Any, **settings: Any) -> None:
    from apps.worker.engine import serve

    serve(connection, **settings)
