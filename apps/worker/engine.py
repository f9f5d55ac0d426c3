"""The worker process: loads models and draws; a job can be canceled between two steps."""

import signal
import threading
import time
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx_snapgen  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
from tqdm import tqdm

from apps.worker.messages import (
    Cancel,
    Converting,
    Downloading,
    Event,
    Failed,
    Finished,
    Job,
    Loaded,
    Loading,
    Notice,
    Picture,
    Progress,
)
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.text_encoders import download_sources
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import encode_png, slug
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice

REPORT_EVERY = 0.1
"""Seconds between two reports of a download."""


class Stop(Exception):
    """The caller ends the process, or has ended."""


class Engine:
    """Runs the jobs that come over `connection`, one after the other."""

    def __init__(self, connection: Any, *, keep: int, cache_limit: int):
        self._connection, self._keep = connection, keep
        self._jobs: deque[tuple[int, Job]] = deque()
        self._cancelled: set[int] = set()
        self._pipelines: OrderedDict[ModelChoice, tuple[SnapGenPipeline, Description]] = (
            OrderedDict()
        )
        mx.set_cache_limit(cache_limit)

    def run(self) -> None:
        """Run jobs until the caller sends None or its process ends."""
        while True:
            while not self._jobs:
                self._receive()
            number, job = self._jobs.popleft()
            self._run_job(number, job)
            self._cancelled.discard(number)
            mx.clear_cache()

    def _receive(self) -> None:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise Stop from None
        if message is None:
            raise Stop
        if isinstance(message, Cancel):
            self._cancelled.add(message.job)
        else:
            self._jobs.append(message)

    def _is_cancelled(self, number: int) -> bool:
        while self._connection.poll():
            self._receive()
        return number in self._cancelled

    def _send(self, event: Event) -> None:
        try:
            self._connection.send(event)
        except OSError:
            raise Stop from None

    def _run_job(self, number: int, job: Job) -> None:
        try:
            with self._notices(number):
                if self._is_cancelled(number):
                    finished = False
                else:
                    pipeline = self._load(number, job.choice)
                    finished = job.settings is None or self._draw(
                        number, job, settings=job.settings, pipeline=pipeline
                    )
            self._send(Finished(number, cancelled=not finished))
        except Stop:
            raise
        except UserError as error:
            self._send(Failed(number, str(error)))
        except Exception as error:
            # Possibly out of memory: free the pipelines, which can be loaded again.
            self._pipelines.clear()
            message = f"{type(error).__name__}: {error}"
            self._send(Failed(number, message, details=traceback.format_exc()))

    def _load(self, number: int, choice: ModelChoice) -> SnapGenPipeline:
        if choice not in self._pipelines:
            self._send(Loading(number))
            folder = open_model(
                choice,
                progress=self._download(number),
                converting=self._download(number, Converting),
                say=lambda line: self._send(Notice(number, line)),
            )
            if isinstance(folder, ModelFolder):
                download_sources(folder, self._download(number))
            while len(self._pipelines) >= self._keep:
                self._pipelines.popitem(last=False)
            mx.clear_cache()
            pipeline = SnapGenPipeline.from_pretrained(choice, folder=folder)
            self._pipelines[choice] = pipeline, folder.config
        self._pipelines.move_to_end(choice)
        pipeline, config = self._pipelines[choice]
        self._send(Loaded(number, choice=choice, config=config))
        return pipeline

    def _download(self, number: int, event: type[Downloading] = Downloading):
        last = 0.0

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= REPORT_EVERY or done == total:
                last = now
                self._send(event(number, name, done=done, total=total))

        return report

    def _draw(
        self, number: int, job: Job, *, settings: DrawSettings, pipeline: SnapGenPipeline
    ) -> bool:
        """Draw a job's pictures; False when it was cancelled."""
        started = time.perf_counter()
        for step in pipeline.generate(settings):
            if self._is_cancelled(number):
                return False
            preview = None
            if not step.final and _has_preview(step.index, step.num_steps, previews=job.previews):
                picture = step.preview()
                preview = encode_png(picture) if job.png_previews else picture.tobytes()
            self._send(
                Progress(
                    number,
                    image=step.image,
                    index=step.index,
                    num_steps=step.num_steps,
                    seed=step.seed,
                    size=(step.metadata["width"], step.metadata["height"]),
                    preview=preview,
                )
            )
            if step.final:
                picture = step.preview()
                self._send(
                    Picture(
                        number,
                        image=step.image,
                        size=picture.size,
                        rgb=picture.tobytes(),
                        png=encode_png(picture, step.metadata),
                        name=slug(settings.prompt),
                        metadata=step.metadata,
                        seconds=time.perf_counter() - started,
                    )
                )
                started = time.perf_counter()
        return True

    @contextmanager
    def _notices(self, number: int) -> Iterator[None]:
        def show(message, category, filename, lineno, file=None, line=None):
            self._send(Notice(number, str(message)))

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield


def _has_preview(index: int, num_steps: int, *, previews: int | None) -> bool:
    """Whether step `index` is one of `previews` spread over the steps before the last."""
    if previews is None:
        return True
    before = num_steps - 1
    count = min(previews, before)
    return any(index == (k + 1) * before // (count + 1) for k in range(count))


def serve(connection: Any, *, keep: int, cache_limit: int) -> None:
    """Entry of the process. It ignores Ctrl-C, which the caller handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own lock is a system semaphore, which would remain when this process is interrupted.
    tqdm.set_lock(threading.RLock())
    try:
        Engine(connection, keep=keep, cache_limit=cache_limit).run()
    except Stop:
        pass
    except KeyboardInterrupt:
        pass
