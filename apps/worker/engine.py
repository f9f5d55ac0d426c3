"""The worker process: loads models and draws; a job can be canceled between two steps."""

import gc
import io
import signal
import threading
import time
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx_snapgen  # noqa: F401  (before mlx)

# isort: split
import mlx.core as mx
from PIL import Image
from tqdm import tqdm

from apps.worker.messages import (
    Cancel,
    Converting,
    Downloading,
    Event,
    Failed,
    FileFormat,
    Finished,
    Job,
    Loaded,
    Loading,
    Notice,
    Opened,
    Picture,
    Progress,
)
from mlx_snapgen._kernel_cache import make_private_cache
from mlx_snapgen.alpha import shown
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.memory import batch_size, needed_bytes, transformer_bytes
from mlx_snapgen.checkpoint.text_encoders import download_sources
from mlx_snapgen.errors import ModelError, SettingsError, UserError
from mlx_snapgen.metadata import encode_png, slug
from mlx_snapgen.open_model import describe_model, open_model
from mlx_snapgen.picture_files import to_rgb
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import GenerationStep, Pipeline
from mlx_snapgen.settings import (
    DrawSettings,
    ModelChoice,
    machine_memory,
)
from mlx_snapgen.teachers.folder import TeacherFolder
from mlx_snapgen.teachers.memory import peak_bytes
from mlx_snapgen.vocabulary import listed

REPORT_EVERY = 0.1
"""Seconds between two reports of a download."""


class Stop(Exception):
    """The caller ends the process, or has ended."""


@dataclass
class _Model:
    """A model in memory."""

    folder: ModelFolder | TeacherFolder
    pipeline: Pipeline
    bytes: int = 0
    """After its latest job."""
    used: float = 0.0
    """When that ended, in seconds."""


class Engine:
    """Runs the jobs that come over `connection`, one after the other.

    Its other arguments are those of `Worker`.
    """

    def __init__(
        self,
        connection: Any,
        *,
        keep: int,
        memory: int | None,
        unload_after: float | None,
        cache_limit: int,
    ):
        self._connection, self._keep, self._unload_after = connection, keep, unload_after
        self._memory = machine_memory() * 3 // 4 if memory is None else memory
        self._jobs: deque[tuple[int, Job]] = deque()
        self._cancelled: set[int] = set()
        # The least recently used first.
        self._models: OrderedDict[ModelChoice, _Model] = OrderedDict()
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
            if latest := self._models.get(job.choice):
                others = sum(model.bytes for model in self._models.values()) - latest.bytes
                latest.bytes = max(0, mx.get_active_memory() - others)
                latest.used = time.monotonic()

    def _receive(self) -> None:
        """Wait for a message; meanwhile free the models that nobody uses."""
        try:
            while not self._connection.poll(self._until_unload()):
                self._free_oldest()
            message = self._connection.recv()
        except (EOFError, OSError):
            raise Stop from None
        if message is None:
            raise Stop
        if isinstance(message, Cancel):
            self._cancelled.add(message.job)
        else:
            self._jobs.append(message)

    def _until_unload(self) -> float | None:
        """Seconds until the next model is to be freed; None if there is none."""
        if self._unload_after is None or not self._models:
            return None
        oldest = next(iter(self._models.values()))
        return max(0.0, oldest.used + self._unload_after - time.monotonic())

    def _free_oldest(self) -> None:
        self._models.popitem(last=False)
        gc.collect()
        mx.clear_cache()

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
                finished = not self._is_cancelled(number)
                if finished and job.settings is None and not job.load:
                    config = (
                        self._open(number, job).config if job.fetch else describe_model(job.choice)
                    )
                    self._send(Opened(number, choice=job.choice, config=config))
                elif finished:
                    pipeline = self._load(number, job)
                    finished = job.settings is None or self._draw(
                        number, job, settings=job.settings, pipeline=pipeline
                    )
            self._send(Finished(number, cancelled=not finished))
        except Stop:
            raise
        except UserError as error:
            self._send(Failed(number, str(error), internal=isinstance(error, ModelError)))
        except Exception as error:
            # Possibly out of memory: free the models, which can be loaded again.
            self._models.clear()
            message = f"{type(error).__name__}: {error}"
            details = traceback.format_exc()
            self._send(Failed(number, message, details=details, internal=True))

    def _open(self, number: int, job: Job) -> ModelFolder | TeacherFolder:
        """The model on this machine: fetched and, if it is a public one, converted."""
        folder = open_model(
            job.choice,
            settings=job.settings,
            progress=self._download(number),
            converting=self._download(number, Converting),
            say=lambda line: self._send(Notice(number, line)),
        )
        if isinstance(folder, ModelFolder):
            download_sources(folder, self._download(number))
        return folder

    def _load(self, number: int, job: Job) -> Pipeline:
        choice = job.choice
        if loaded := self._models.get(choice):
            self._models.move_to_end(choice)
            self._make_room(job, loaded.folder, kept=1)
        else:
            self._send(Loading(number))
            with _loading():
                folder = self._open(number, job)
            self._make_room(job, folder, kept=0)
            with _loading():
                loaded = _Model(folder, SnapGenPipeline.from_pretrained(choice, folder=folder))
            self._models[choice] = loaded
        vocabulary = loaded.pipeline.vocabulary
        words = None if vocabulary is None else listed(vocabulary)
        self._send(Loaded(number, choice=choice, config=loaded.folder.config, words=words))
        return loaded.pipeline

    def _make_room(self, job: Job, folder: ModelFolder | TeacherFolder, *, kept: int) -> None:
        """Free the least recently used models that a job leaves no memory for.

        Args:
            folder: of the job's model.
            kept: how many of the latest models stay: 1 if the job's is loaded already.
        """
        mx.clear_cache()
        if len(self._models) == kept:
            return
        needed = needed_memory(folder, job.choice, job.settings or DrawSettings())
        while others := list(self._models.values())[: len(self._models) - kept]:
            enough = sum(model.bytes for model in others) + needed <= self._memory
            if enough and len(others) < self._keep:
                return
            self._free_oldest()

    def _download(self, number: int, event: type[Downloading] = Downloading):
        last = 0.0

        def report(name: str, done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= REPORT_EVERY or done == total:
                last = now
                self._send(event(number, name, done=done, total=total))

        return report

    def _draw(self, number: int, job: Job, *, settings: DrawSettings, pipeline: Pipeline) -> bool:
        """Draw a job's pictures; False when it was cancelled."""
        started, denoising = time.perf_counter(), 0.0

        def show(step: GenerationStep) -> Image.Image:
            picture = step.preview()
            if job.enlarged is None:
                return picture
            return picture.resize(job.enlarged, Image.Resampling.LANCZOS)

        for step in pipeline.generate(settings):
            if self._is_cancelled(number):
                return False
            preview, decoding = None, time.perf_counter()
            if not step.final and _has_preview(step.index, step.num_steps, previews=job.previews):
                picture = show(step)
                form = job.file_format
                preview = encode_picture(picture, form) if form else shown(picture).tobytes()
            self._send(
                Progress(
                    number,
                    image=step.image,
                    index=step.index,
                    num_steps=step.num_steps,
                    seed=step.seed,
                    size=job.enlarged or (step.metadata["width"], step.metadata["height"]),
                    preview=preview,
                )
            )
            if step.final:
                if step.image == step.batch[0]:
                    # Of the steps, which the pictures of a batch share, and then of each decoding.
                    denoising = (decoding - started) / len(step.batch)
                    started = decoding
                picture, metadata = show(step), step.metadata
                if job.enlarged is not None:
                    width, height = job.enlarged
                    how = {"width": width, "height": height, "resampling": "lanczos"}
                    metadata = metadata | {"upscaled": how}
                self._send(
                    Picture(
                        number,
                        image=step.image,
                        size=picture.size,
                        rgb=shown(picture).tobytes(),
                        file=encode_picture(picture, job.file_format or FileFormat(), metadata),
                        name=slug(settings.prompt),
                        metadata=metadata,
                        seconds=denoising + time.perf_counter() - started,
                    )
                )
                started = time.perf_counter()
        return True

    @contextmanager
    def _notices(self, number: int) -> Iterator[None]:
        def show(message, category, filename, lineno, file=None, line=None):
            # A job has one prompt: a note need not name it.
            self._send(Notice(number, getattr(message, "problem", None) or str(message)))

        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield


@contextmanager
def _loading() -> Iterator[None]:
    """What is wrong in this context is the model, except for settings."""
    try:
        yield
    except SettingsError:
        raise
    except UserError as error:
        raise ModelError(error) from None


def needed_memory(
    folder: ModelFolder | TeacherFolder, choice: ModelChoice, settings: DrawSettings
) -> int:
    """Estimate of the bytes that drawing takes, with the model: the one that the pipeline checks.

    Raises:
        UserError: settings that the model does not support.
    """
    settings = settings.resolved(folder.config)
    height, width = settings.height, settings.width
    assert height is not None and width is not None
    if isinstance(folder, TeacherFolder):
        return peak_bytes(folder, choice, settings=settings)(height, width)
    transformer = transformer_bytes(folder, choice)
    count = min(batch_size(settings, choice, transformer=transformer), settings.num_images)
    guided = settings.guidance_scale != 1
    return needed_bytes(transformer, height, width, pictures=count, guided=guided)


def _has_preview(index: int, num_steps: int, *, previews: int | None) -> bool:
    """Whether step `index` is one of `previews` spread over the steps before the last."""
    if previews is None:
        return True
    before = num_steps - 1
    count = min(previews, before)
    return any(index == (k + 1) * before // (count + 1) for k in range(count))


def encode_picture(
    picture: Image.Image, form: FileFormat, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """A picture as the bytes of a file."""
    if form.opaque or form.kind == "jpeg":
        picture, _ = to_rgb(picture)
    if form.kind == "png":
        return encode_png(picture, metadata)
    buffer = io.BytesIO()
    picture.save(buffer, form.kind, quality=form.quality)
    return buffer.getvalue()


def serve(connection: Any, **settings: Any) -> None:
    """Entry of the process, with the arguments of `Engine`. It ignores Ctrl-C, which the caller
    handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    make_private_cache()
    # tqdm's own lock is a system semaphore, which would remain when this process is interrupted.
    tqdm.set_lock(threading.RLock())
    try:
        Engine(connection, **settings).run()
    except Stop:
        pass
    except KeyboardInterrupt:
        pass
