"""The worker's process: loads models, draws, and looks between two steps whether to go on."""

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
from PIL import Image
from tqdm import tqdm

from apps.worker.messages import (
    Cancel,
    Downloading,
    Event,
    Failed,
    Finished,
    Job,
    Loaded,
    Loading,
    ModelChoice,
    Notice,
    Picture,
    Progress,
)
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.text_encoders import download_sources
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import encode_png, slug
from mlx_snapgen.pipeline import GenerationStep, SnapGenPipeline

REPORT_EVERY = 0.1
"""Seconds between two reports of a download."""


class Stop(Exception):
    """The caller is gone or wants no more."""


class Engine:
    """Runs the jobs that come over `connection`, one after the other."""

    def __init__(self, connection: Any, keep: int, cache_limit: int):
        self._connection, self._keep = connection, keep
        self._jobs: deque[tuple[int, Job]] = deque()
        self._cancelled: set[int] = set()
        self._pipelines: OrderedDict[ModelChoice, tuple[SnapGenPipeline, ModelConfig]] = (
            OrderedDict()
        )
        mx.set_cache_limit(cache_limit)

    def run(self) -> None:
        """Until the caller says so or is gone."""
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
                    finished = job.prompt is None or self._draw(number, job, pipeline)
            self._send(Finished(number, cancelled=not finished))
        except Stop:
            raise
        except UserError as error:
            self._send(Failed(number, str(error)))
        except Exception as error:
            # What failed may have been the memory: give back what can be loaded again.
            self._pipelines.clear()
            message = f"{type(error).__name__}: {error}"
            self._send(Failed(number, message, traceback.format_exc()))

    def _load(self, number: int, choice: ModelChoice) -> SnapGenPipeline:
        if choice not in self._pipelines:
            self._send(Loading(number))
            folder = ModelFolder.open(
                choice.model, revision=choice.revision, progress=self._download(number)
            )
            config = folder.config
            download_sources(folder, self._download(number))
            while len(self._pipelines) >= self._keep:
                self._pipelines.popitem(last=False)
            mx.clear_cache()
            self._pipelines[choice] = (
                SnapGenPipeline.from_pretrained(
                    choice.model,
                    choice.revision,
                    choice.model_width,
                    choice.quantize,
                    loras=choice.loras,
                    text_encoders=choice.text_encoders,
                    keep_text_encoders=choice.keep_text_encoders,
                ),
                config,
            )
        self._pipelines.move_to_end(choice)
        pipeline, config = self._pipelines[choice]
        self._send(Loaded(number, choice, config))
        return pipeline

    def _download(self, number: int):
        last = 0.0

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= REPORT_EVERY or done == total:
                last = now
                self._send(Downloading(number, name, done, total))

        return report

    def _draw(self, number: int, job: Job, pipeline: SnapGenPipeline) -> bool:
        """Whether the job came to its end."""
        started = time.perf_counter()
        steps = pipeline.generate(
            job.prompt,
            negative_prompt=job.negative_prompt,
            height=job.height,
            width=job.width,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            few_step=job.few_step,
            attention_modulation=job.attention_modulation,
            seed=job.seed,
            num_images=job.num_images,
        )
        for step in steps:
            if self._is_cancelled(number):
                return False
            size = step.metadata["width"], step.metadata["height"]
            wanted = step.final or _has_preview(step.index, step.num_steps, job.previews)
            picture = step.preview() if wanted else None
            preview = None
            if picture is not None and not step.final:
                preview = encode_png(picture) if job.png_previews else picture.tobytes()
            self._send(
                Progress(number, step.image, step.index, step.num_steps, step.seed, size, preview)
            )
            if step.final:
                self._finish(number, job, step, picture, time.perf_counter() - started)
                started = time.perf_counter()
        return True

    def _finish(
        self, number: int, job: Job, step: GenerationStep, picture: Image.Image, seconds: float
    ) -> None:
        self._send(
            Picture(
                number,
                step.image,
                picture.size,
                picture.tobytes(),
                encode_png(picture, step.metadata),
                slug(job.prompt),
                step.metadata,
                seconds,
            )
        )

    @contextmanager
    def _notices(self, number: int) -> Iterator[None]:
        def show(message, category, filename, lineno, file=None, line=None):
            self._send(Notice(number, str(message)))

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield


def _has_preview(index: int, num_steps: int, previews: int | None) -> bool:
    """Whether step `index` is one of `previews` spread over the steps before the last."""
    if previews is None:
        return True
    before = num_steps - 1
    count = min(previews, before)
    return any(index == (k + 1) * before // (count + 1) for k in range(count))


def serve(connection: Any, keep: int, cache_limit: int) -> None:
    """Entry of the process. Ctrl-C in a terminal reaches it too, and is the caller's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own lock is a semaphore of the system, which this process would leave when interrupted.
    tqdm.set_lock(threading.RLock())
    try:
        Engine(connection, keep, cache_limit).run()
    except Stop:
        pass
    except KeyboardInterrupt:
        pass
