"""The worker's process: previews, cancelling, mistakes, and a death that nobody waits for."""

import errno
import io
import multiprocessing
import os
import queue
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from apps.worker.client import Worker
from apps.worker.engine import Engine, Stop, needed_memory
from apps.worker.messages import (
    Converting,
    Downloading,
    Failed,
    Finished,
    Job,
    Loaded,
    Loading,
    Notice,
    Opened,
    Picture,
    Progress,
)
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.memory import BASE_BYTES
from mlx_snapgen.checkpoint.model import save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import KEY
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice
from mlx_snapgen.teachers.config import KLEIN
from tests.tiny import FLUX2, FLUX2_AUTOENCODER, TEACHER, require, write_teacher

PATIENCE = 120


class Listener:
    """A worker and everything that it says."""

    def __init__(self, **settings):
        self.events = queue.SimpleQueue()
        self.worker = Worker(self.events.put, **settings)

    def until(self, *kinds, job=None, patience=PATIENCE):
        """All events up to the first of these kinds; `queue.Empty` after `patience` seconds."""
        seen, end = [], time.monotonic() + patience
        while not (seen and isinstance(seen[-1], kinds) and job in (None, seen[-1].job)):
            # A job whose cancel is ignored would send events for ever.
            seen.append(self.events.get(timeout=max(0, end - time.monotonic())))
        return seen

    def result(self, job):
        return self.until(Finished, Failed, job=self.worker.submit(job))


@pytest.fixture(scope="module")
def listener():
    made = Listener()
    yield made
    pid = made.worker.pid
    made.worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.fixture
def job(model_folder):
    return Job(
        ModelChoice(str(model_folder)), DrawSettings("a red apple", seed=3, num_inference_steps=3)
    )


def drawing(job, **settings):
    """`job` with other settings."""
    return replace(job, settings=replace(job.settings, **settings))


def test_it_draws_what_the_pipeline_draws_and_shows_every_step(listener, job, model_folder):
    events = listener.result(drawing(job, num_images=2))
    kinds = [type(e) for e in events]
    # The pictures of a batch take turns.
    assert kinds == [Loading, Loaded, *[Progress] * 4, *[Progress, Picture] * 2, Finished]
    assert [(e.image, e.index) for e in events if isinstance(e, Progress)] == [
        (k, i) for i in range(3) for k in range(2)
    ]
    assert events[1].config.name == "random"

    seen = []
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    expected = pipe(
        "a red apple",
        seed=3,
        num_inference_steps=3,
        num_images=2,
        callback=lambda step: seen.append(step.preview()),
    )
    pictures = [e for e in events if isinstance(e, Picture)]
    assert [e.rgb for e in pictures] == [image.tobytes() for image in expected]
    previews = [e.preview for e in events if isinstance(e, Progress)]
    # The last step's preview is the picture itself, which comes as such.
    assert previews == [*(p.tobytes() for p in seen[:4]), None, None]
    with Image.open(io.BytesIO(pictures[1].file)) as image:
        assert np.array_equal(np.array(image), np.array(expected[1]))
        assert '"seed": 4' in image.info[KEY]
    assert pictures[0].name == "a-red-apple"


@pytest.mark.parametrize(
    ("previews", "steps"), [(0, []), (1, [2]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_previews_are_spread_over_the_steps(listener, job, previews, steps):
    events = listener.result(replace(drawing(job, num_inference_steps=5), previews=previews))
    progress = [e for e in events if isinstance(e, Progress)]
    assert [e.index for e in progress if e.preview is not None] == steps
    assert len(progress) == 5


def test_a_cancelled_job_ends_within_a_step(listener, job):
    long = drawing(job, num_inference_steps=1000, num_images=100)
    number = listener.worker.submit(long)
    listener.until(Progress)
    listener.worker.cancel(number)
    sent = time.monotonic()
    assert listener.until(Finished, patience=20)[-1] == Finished(number, cancelled=True)
    assert time.monotonic() - sent < 10
    assert listener.result(job)[-1].cancelled is False


def test_a_waiting_job_can_be_cancelled(listener, job):
    first = listener.worker.submit(drawing(job, num_inference_steps=300))
    second = listener.worker.submit(job)
    listener.worker.cancel(second)
    listener.until(Progress)
    listener.worker.cancel(first)
    ends = [e for e in listener.until(Finished, job=second) if isinstance(e, Finished)]
    assert ends == [Finished(first, True), Finished(second, True)]


def test_mistakes_are_messages_and_bugs_have_details(listener, job):
    failed = listener.result(drawing(job, height=33))[-1]
    assert "multiple of" in failed.message
    assert failed.details is None and not failed.internal
    failed = listener.result(replace(job, choice=ModelChoice("/no/such/folder")))[-1]
    assert "no model folder" in failed.message and failed.internal
    failed = listener.result(drawing(job, negative_prompt=7, guidance_scale=2.0))[-1]
    assert isinstance(failed, Failed)
    assert "Traceback" in failed.details and failed.internal
    events = listener.result(drawing(job, prompt="zzz"))
    assert [type(e) for e in events[:2]] == [Loading, Loaded]  # a bug gives the memory back
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert notices and not any(text.startswith('"zzz"') for text in notices)


def test_a_dead_process_fails_its_jobs_and_comes_back(listener, job):
    number = listener.worker.submit(drawing(job, num_inference_steps=1000))
    listener.until(Progress)
    os.kill(listener.worker.pid, signal.SIGKILL)
    failed = listener.until(Failed)[-1]
    assert failed.job == number
    assert "signal 9" in failed.message
    assert isinstance(listener.result(job)[-1], Finished)


def test_a_process_that_is_killed_while_idle_is_replaced_unseen(listener, job):
    assert isinstance(listener.result(job)[-1], Finished)
    before, ends = listener.worker.pid, listener.worker.ends
    # It is still there for the caller, but takes no job any more.
    os.kill(before, signal.SIGSTOP)
    first, cancelled = (listener.worker.submit(job) for _ in range(2))
    listener.worker.cancel(cancelled)
    os.kill(before, signal.SIGKILL)
    events = listener.until(Finished, Failed, job=cancelled)
    drawn = [type(e) for e in events if e.job == first]
    assert drawn == [Loading, Loaded, *[Progress] * 3, Picture, Finished]
    assert events[-1] == Finished(cancelled, cancelled=True)
    assert listener.worker.pid != before and listener.worker.ends == ends + 1


def test_a_job_is_given_to_a_second_process_and_not_to_a_third(listener, job):
    assert isinstance(listener.result(job)[-1], Finished)
    os.kill(listener.worker.pid, signal.SIGSTOP)
    number = listener.worker.submit(job)
    for _ in range(2):
        before = listener.worker.pid
        os.kill(before, signal.SIGKILL)
        end = time.monotonic() + PATIENCE
        while listener.worker.pid == before and time.monotonic() < end:
            time.sleep(0.005)
        if listener.worker.pid is not None:
            os.kill(listener.worker.pid, signal.SIGSTOP)
    assert [type(e) for e in listener.until(Failed, job=number)] == [Failed]
    assert isinstance(listener.result(job)[-1], Finished)


def test_a_waiting_job_outlives_the_one_that_ends_the_process(listener, job):
    first = listener.worker.submit(drawing(job, num_inference_steps=1000))
    listener.until(Progress)
    second = listener.worker.submit(job)
    os.kill(listener.worker.pid, signal.SIGKILL)
    ends = [e for e in listener.until(Finished, job=second) if isinstance(e, Finished | Failed)]
    assert [(type(e), e.job) for e in ends] == [(Failed, first), (Finished, second)]


def test_a_waiting_job_outlives_all_that_end_their_process(listener, job):
    long = drawing(job, num_inference_steps=1000)
    numbers = [listener.worker.submit(j) for j in (long, long, job)]
    seen = []
    for _ in range(2):
        seen += listener.until(Progress)
        os.kill(listener.worker.pid, signal.SIGKILL)
        seen += listener.until(Failed)
    seen += listener.until(Finished, Failed, job=numbers[2])
    ends = [(type(e), e.job) for e in seen if isinstance(e, Finished | Failed)]
    assert ends == list(zip((Failed, Failed, Finished), numbers, strict=True))


@pytest.mark.parametrize("hangs", [True, False])
def test_jobs_fail_if_no_other_process_can_be_started(job, monkeypatch, hangs):
    def refuse(self):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    listener = Listener()
    drawn, waiting = (listener.worker.submit(drawing(job, num_inference_steps=n)) for n in (999, 3))
    listener.until(Progress)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
        if hangs:
            listener.worker.replace("no step in 5 s")
        else:
            os.kill(listener.worker.pid, signal.SIGKILL)
        events = listener.until(Failed, job=waiting)
    assert [e.job for e in events if isinstance(e, Failed)] == [drawn, waiting]
    assert isinstance(listener.result(job)[-1], Finished)
    listener.worker.close()


def test_a_killed_worker_is_not_replaced(job):
    listener = Listener()
    numbers = [listener.worker.submit(job) for _ in range(2)]
    listener.worker.kill()
    listener.worker.replace("no step in 5 s")
    ends = listener.until(Failed, job=numbers[1])
    assert [type(end) for end in ends] == [Failed, Failed]
    assert all("ended unexpectedly (signal 9)" in end.message for end in ends)
    assert listener.worker.pid is None
    listener.worker.close()


def test_a_hung_process_is_replaced_and_the_waiting_jobs_are_drawn(listener, job):
    hung = listener.worker.submit(drawing(job, num_inference_steps=1000))
    listener.until(Progress)
    cancelled, waiting = (listener.worker.submit(job) for _ in range(2))
    listener.worker.cancel(cancelled)
    os.kill(listener.worker.pid, signal.SIGSTOP)
    listener.worker.replace("no step in 5 s")
    events = listener.until(Finished, job=waiting)
    ends = [e for e in events if isinstance(e, Finished | Failed)]
    assert [e.job for e in ends] == [hung, cancelled, waiting]
    assert ends[0].message == "no step in 5 s"
    assert (ends[1].cancelled, ends[2].cancelled) == (True, False)
    assert sum(isinstance(e, Picture) for e in events) == 1
    listener.worker.replace("nothing to do")
    assert isinstance(listener.result(job)[-1], Finished)


def test_events_of_a_replaced_process_are_dropped(job):
    """It may have begun with the next job, which the new one draws from the start."""
    events, reading = queue.SimpleQueue(), threading.Event()

    def deliver(event):
        events.put(event)
        if isinstance(event, Finished):
            reading.wait(PATIENCE)

    worker = Worker(deliver)
    try:
        first, hung, waiting = (worker.submit(j) for j in (job, job, drawing(job, num_images=500)))
        while events.get(timeout=PATIENCE) != Finished(first, cancelled=False):
            pass
        time.sleep(2)  # what the old process sends is not read
        threading.Timer(0.5, reading.set).start()
        worker.replace("no step in 5 s")
        found = [events.get(timeout=PATIENCE) for _ in range(2)]
        assert [(type(event), event.job) for event in found] == [(Failed, hung), (Loading, waiting)]
    finally:
        worker.close()


def test_an_interrupt_stops_at_once(listener, job):
    number = listener.worker.submit(drawing(job, num_inference_steps=1000))
    listener.until(Progress)
    listener.worker.interrupt()
    assert listener.until(Finished)[-1] == Finished(number, cancelled=True)
    assert isinstance(listener.result(job)[-1], Finished)


@pytest.fixture
def second_folder(components, tmp_path):
    save_pretrained(tmp_path / "second", components)
    return tmp_path / "second"


def loads(listener, job, *folders):
    """Which of the models had to be loaded, in this order."""
    jobs = [replace(job, choice=ModelChoice(str(folder))) for folder in folders]
    return [any(isinstance(e, Loading) for e in listener.result(job)) for job in jobs]


def test_models_are_loaded_on_demand_and_freed_when_memory_asks(job, model_folder, second_folder):
    a, b = model_folder, second_folder
    made = Listener(keep=2)
    assert loads(made, job, a, b, a, b) == [True, True, False, False]
    made.worker.close()
    made = Listener(keep=2, memory=1)
    assert loads(made, job, a, a, b, b, a) == [True, False, True, False, True]
    made.worker.close()
    # The models fit, but not with a picture.
    made = Listener(keep=2, memory=BASE_BYTES)
    assert loads(made, job, a, b, a) == [True, True, True]
    made.worker.close()
    made = Listener(keep=1)
    assert loads(made, job, a, b, b, a) == [True, True, False, True]
    made.worker.close()


def test_an_idle_model_is_freed(job, model_folder):
    made = Listener(unload_after=0.5)
    assert loads(made, job, model_folder, model_folder) == [True, False]
    time.sleep(1)
    assert loads(made, job, model_folder) == [True]
    made.worker.close()


def test_a_model_can_be_opened_alone(listener, job, model_folder):
    events = listener.result(Job(job.choice, load=False))
    assert [type(e) for e in events] == [Opened, Finished]
    assert events[0].config.image_size == (32, 64)


def test_downloads_report_bytes(monkeypatch):
    seen = []

    def snapshot_download(repo, *, tqdm_class, **_):
        with tqdm_class(total=10, unit="B", mininterval=0, desc="x") as bar:
            bar.update(4)
            bar.update(6)
        return repo

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_model("someone/model", progress=lambda *said: seen.append(said))
    assert ("someone/model", 4, 10) in seen
    assert seen[-1] == ("someone/model", 10, 10)
    assert Downloading(1, *seen[-1]).total == 10


def test_a_public_model_is_converted_and_drawn(tmp_path, monkeypatch):
    """From a folder in diffusers' format; what it takes is a notice, and it cannot do all."""
    require("mlx_lm", "torch", "diffusers", "transformers")
    from convert.parity.originals import z_image_pipeline

    folder = tmp_path / "turbo"
    z_image_pipeline().save_pretrained(folder)
    monkeypatch.setenv("MLX_SNAPGEN_CACHE", str(tmp_path / "cache"))
    choice = ModelChoice(str(folder), quantize=0)
    job = Job(choice, DrawSettings("a red car", height=32, width=48, num_inference_steps=2))
    made = Listener()
    failed = made.result(drawing(job, guidance_scale=3.0))[-1]
    assert failed.message == "Z-Image-Turbo has no guidance: leave out the guidance scale 3"
    assert failed.details is None and not failed.internal
    assert not (tmp_path / "cache").exists(), "it is refused before the conversion"
    events = made.result(job)
    [notice] = [e for e in events if isinstance(e, Notice)]
    assert notice.text.startswith("Z-Image-Turbo (") and "converting it once" in notice.text
    assert {e.name for e in events if isinstance(e, Converting)} == {"z-image", "qwen"}
    [loaded] = [e for e in events if isinstance(e, Loaded)]
    assert loaded.config.name == "Z-Image-Turbo" and not loaded.config.abilities().guidance
    [picture] = [e for e in events if isinstance(e, Picture)]
    assert picture.size == (48, 32) and picture.metadata["model_name"] == "Z-Image-Turbo"
    failed = made.result(drawing(job, guidance_scale=3.0))[-1]
    assert failed.message == "Z-Image-Turbo has no guidance: leave out the guidance scale 3"
    assert failed.details is None
    made.worker.close()


def test_the_models_used_last_stay_in_memory(model_folder):
    """In this process; the messages come from a list."""
    choices = [
        ModelChoice(model=str(model_folder), model_width=w) for w in ("full", "small", "tiny")
    ]
    jobs = [Job(choices[k]) for k in (0, 1, 0, 2, 0, 1)]
    messages, sent = [*enumerate(jobs), None], []
    # A message is there if the engine waits for one, but none interrupts a job.
    connection = SimpleNamespace(
        recv=lambda: messages.pop(0), poll=lambda *seconds: bool(seconds), send=sent.append
    )
    with pytest.raises(Stop):
        Engine(connection, keep=2, memory=None, unload_after=None, cache_limit=1 << 30).run()
    assert [event.job for event in sent if isinstance(event, Loading)] == [0, 1, 3, 5]


@pytest.fixture
def klein(tmp_path):
    parts = {"transformer": FLUX2, "autoencoder": FLUX2_AUTOENCODER}
    config = replace(TEACHER, kind="flux2", **parts, schedule=KLEIN, few_step=KLEIN)
    return write_teacher(tmp_path / "klein", config)


@pytest.mark.usefixtures("no_language_model")
@pytest.mark.parametrize(
    ("model", "settings", "options"),
    [
        ("own", {}, {}),
        ("own", {"height": 64, "width": 96}, {"model_width": "tiny"}),
        ("klein", {}, {}),
        ("klein", {}, {"low_memory": True}),
        ("own", {"num_images": 3, "batch_size": 256}, {}),
        ("klein", {"image": "a.png", "mask": "mask.png"}, {}),
        ("klein", {"image": "a.png", "mask": "mask.png", "edit": ("a.png",)}, {"low_memory": True}),
        ("klein", {"edit": ("a.png", "a.png"), "height": 320, "width": 32}, {}),
    ],
)
def test_a_job_is_estimated_as_the_pipeline_checks_it(
    model, settings, options, model_folder, klein, tmp_path, monkeypatch
):
    """Models were freed for a job of `low_memory`, and for a mask too few of them."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (256, 320)).save("a.png")
    Image.new("L", (256, 320), 255).save("mask.png")
    choice = ModelChoice(str({"own": model_folder, "klein": klein}[model]), **options)
    drawn = DrawSettings("a red car", **settings)
    pipe = SnapGenPipeline.from_pretrained(choice)
    needed = needed_memory(open_model(choice), choice, drawn)
    for place in ("checkpoint", "teachers"):
        monkeypatch.setattr(f"mlx_snapgen.{place}.memory.machine_memory", lambda: needed)
    pipe.generate(drawn)
    for place in ("checkpoint", "teachers"):
        monkeypatch.setattr(f"mlx_snapgen.{place}.memory.machine_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="of memory, and this machine has"):
        pipe.generate(drawn)
