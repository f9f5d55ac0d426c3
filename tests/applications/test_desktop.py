"""The window, driven as a user would in a virtual screen, with real drawing by a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.desktop.history import History
from apps.desktop.run import Run
from apps.desktop.settings import Settings, load_settings, save_settings
from apps.worker.messages import Downloading, Loaded, Progress
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import encode_png, read_metadata
from mlx_snapgen.settings import DrawSettings, ModelChoice
from tests.tiny import memory

ROOT = Path(__file__).parents[2]
PATIENCE = 120

# --- without a screen ---------------------------------------------------------------------------


def test_settings_survive_being_written(tmp_path):
    path = tmp_path / "deep" / "settings.json"
    settings = Settings(
        draw=DrawSettings("ein grüner Apfel", guidance_scale=2.0, few_step=False),
        choice=ModelChoice(loras=(("a.safetensors", 0.5),), text_encoders=("clip",)),
        seed_locked=True,
        recent_models=("a", "b"),
    )
    save_settings(path, settings)
    assert load_settings(path) == (settings, None)
    assert os.listdir(path.parent) == ["settings.json"]


OLD = """{"prompt": "ein grüner Apfel", "negative_prompt": "cats", "seed": 9, "seed_locked": true,
"model": "owner/name", "revision": "main", "model_width": "tiny", "quantize": 8, "loras":
[["a.safetensors", 0.5]], "text_encoders": ["clip"], "height": 96, "width": 64,
"num_inference_steps": 12, "guidance_scale": 2.5, "few_step": false, "attention_modulation": true,
"num_images": 3, "appearance": "dark", "geometry": "900x600+10+10", "recent_models": ["a", "b"],
"folder": "/tmp"}"""


def test_settings_of_the_first_version_are_read(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(OLD, encoding="utf-8")
    expected = Settings(
        draw=DrawSettings(
            "ein grüner Apfel",
            negative_prompt="cats",
            seed=9,
            height=96,
            width=64,
            num_inference_steps=12,
            guidance_scale=2.5,
            few_step=False,
            attention_modulation=True,
            num_images=3,
        ),
        choice=ModelChoice(
            "owner/name",
            "main",
            model_width="tiny",
            quantize=8,
            loras=(("a.safetensors", 0.5),),
            text_encoders=("clip",),
        ),
        seed_locked=True,
        appearance="dark",
        geometry="900x600+10+10",
        recent_models=("a", "b"),
        folder="/tmp",
    )
    assert load_settings(path) == (expected, None)
    save_settings(path, expected)
    assert json.loads(OLD).items() <= json.loads(path.read_text(encoding="utf-8")).items()


@pytest.mark.parametrize("damaged", ["", "{", "[]", "\x00\x00", '{"prompt": "a'])
def test_damaged_settings_are_set_aside(tmp_path, damaged):
    path = tmp_path / "settings.json"
    for number in (1, 2):
        path.write_text(damaged)
        settings, notice = load_settings(path)
        assert settings == Settings()
        assert f"settings.damaged-{number}.json" in notice
        assert (tmp_path / f"settings.damaged-{number}.json").read_text() == damaged
        assert not path.exists()


def test_odd_settings_are_left_out(tmp_path):
    path = tmp_path / "settings.json"
    odd = {"seed": "7", "loras": [["a", 1, 2]], "guidance_scale": True, "later": 1, "height": None}
    path.write_text(json.dumps({"prompt": "a cat", **odd}))
    settings, notice = load_settings(path)
    assert settings == Settings(draw=DrawSettings("a cat"))
    assert notice == "ignored settings: seed, loras, guidance_scale, later"


def test_a_failed_write_leaves_the_old_settings(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    save_settings(path, Settings(draw=DrawSettings("old")))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_settings(path, Settings(draw=DrawSettings("new")))
    assert os.listdir(tmp_path) == ["settings.json"]
    assert load_settings(path)[0].draw.prompt == "old"


def test_history_keeps_the_newest(tmp_path):
    history = History(tmp_path / "history", limit=3)
    for shade in range(5):
        image = Image.new("RGB", (40, 20), (shade, 0, 0))
        entry = history.add(f"picture-{shade}", encode_png(image))
    assert entry.name == "picture-4"
    (history.folder / "mine.png").write_text("not a picture, not the history's")
    (history.folder / "20200101-000000000000_broken.png").write_text("not a picture")
    loaded = list(history.load())
    assert [e.name for e, _ in loaded] == ["picture-4", "picture-3", "picture-2"]
    assert all(small.size == (84, 42) for _, small in loaded)
    history.delete(entry)
    assert [e.name for e, _ in history.load()] == ["picture-3", "picture-2"]


def test_a_run_tells_how_far_it_is():
    now = 0.0
    run = Run(1, DrawSettings(num_images=2), clock=lambda: now)
    run.take(Downloading(1, "someone/model", 250_000_000, 1_000_000_000))
    assert run.status == "Downloading someone/model: 250 of 1000 MB"
    now = 30.0
    run.take(Downloading(1, "someone/model", 500_000_000, 1_000_000_000))
    assert run.status.endswith("500 of 1000 MB · 30 s left")
    assert not run.between_steps
    run.take(Loaded(1, ModelChoice(), None))
    assert run.between_steps
    now = 80.0
    run.take(Progress(1, 0, 4, 10, 7, (32, 32), None))
    assert run.share == 0.25
    assert run.status == "Picture 1 of 2, step 5 of 10 · 2 min 30 s left"


# --- in a virtual screen ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screen():
    """An X server of our own, as the environment."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if sys.platform == "darwin":
        pytest.skip("a Mac has no virtual screen")
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed (apt install xvfb)")
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1280x900x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        number = pipe.readline().strip()
    if not number:
        pytest.skip("Xvfb does not start")
    yield {"DISPLAY": f":{number}"}
    server.terminate()
    server.wait()


def wait(window, condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        window.update()
        time.sleep(0.002)
        assert time.monotonic() < end, f"{what} did not come; {window.status.get()!r}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def window(screen, model_folder, data):
    from apps.desktop.window import Window

    choice = ModelChoice(str(model_folder), model_width="tiny")
    start = Settings(draw=DrawSettings(), choice=choice, appearance="light")
    save_settings(data / "settings.json", start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISPLAY", screen["DISPLAY"])
        window = Window(data)
        wait(window, lambda: window.run is None, "the model")
        # No window manager hands out the focus here.
        window.focus_force()
        yield window
        pid = window.worker.pid
        window.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def type_into(widget, text):
    widget.focus_force()
    widget.update()
    for letter in text:
        widget.event_generate("<Key>", keysym="space" if letter == " " else letter)
    widget.update()


def set_form(window, prompt="a red apple", seed_locked=False, model_width="tiny", **values):
    choice = ModelChoice(window.settings.choice.model, model_width=model_width)
    draw = DrawSettings(prompt, **values)
    window.form.show(Settings(draw=draw, choice=choice, seed_locked=seed_locked))


def drawn(window):
    wait(window, lambda: window.run is None, "the end")
    return window.strip.entries[0]


def test_typing_and_generating_shows_previews_and_keeps_the_picture(window, monkeypatch):
    shown = []
    real = window.view.show
    monkeypatch.setattr(
        window.view, "show", lambda *a: (shown.append(a[0] and a[0].tobytes()), real(*a))
    )
    set_form(window, "", seed=5, seed_locked=True, num_inference_steps=4)
    type_into(window.form.prompt, "a red apple")
    assert window.form.prompt.get("1.0", "end").strip() == "a red apple"
    before = len(window.strip.entries)
    window.form.prompt.event_generate("<Control-Return>")
    assert window.go.cget("text") == "Cancel"
    entry = drawn(window)
    assert len(window.strip.entries) == before + 1
    assert len(set(shown) - {None}) > 1, "no preview before the picture"
    values = read_metadata(entry.path)
    assert (values["prompt"], values["seed"], values["model_width"]) == ("a red apple", 5, "tiny")
    with Image.open(entry.path) as image:
        assert np.array_equal(np.array(image), np.array(window.view.image))
    assert window.go.cget("text") == "Generate"
    assert window.banner.message == ""


def test_the_window_stays_alive_while_drawing(window, monkeypatch):
    """Work of one callback, in CPU time, so that a busy machine does not count."""
    spent = []
    real = window._handle

    def timed(*arguments, **named):
        started = time.thread_time()
        try:
            return real(*arguments, **named)
        finally:
            spent.append(time.thread_time() - started)

    monkeypatch.setattr(window, "_handle", timed)
    set_form(window, num_inference_steps=10, height=256, width=256)
    window.generate()
    drawn(window)
    assert len(spent) > 10
    assert max(spent) < 0.05


def test_escape_cancels_within_a_step(window):
    set_form(window, num_inference_steps=1000, num_images=10)
    before = len(window.strip.entries)
    window.generate()
    wait(window, lambda: window.run.share > 0, "a step")
    window.event_generate("<Escape>")
    wait(window, lambda: window.run is None, "the end")
    assert window.status.get() == "Stopped"
    assert len(window.strip.entries) == before


def test_history_restores_all_settings_and_saves(window, tmp_path):
    set_form(window, "a blue car", negative_prompt="cats", seed=9, seed_locked=True,
             num_inference_steps=2, guidance_scale=2.5, height=32, width=96,
             attention_modulation=True)  # fmt: skip
    before = window.form.read(window.settings)
    window.generate()
    entry = drawn(window)
    set_form(window, "something else", seed=1, num_inference_steps=7, model_width="full")
    window.update()
    canvas = window.strip._canvas
    canvas.event_generate("<Button-1>", x=40, y=40)
    window.update()
    restored = window.form.read(window.settings)
    assert replace(restored.draw, few_step=None) == before.draw
    assert (restored.choice, restored.seed_locked) == (before.choice, True)

    target = tmp_path / "saved.png"
    window.pictures.save_to(entry, target)
    assert target.read_bytes() == entry.path.read_bytes()
    set_form(window, "something else")
    window.pictures.open_picture(target)
    assert window.form.read(window.settings).draw.prompt == "a blue car"
    window.pictures.open_picture(tmp_path / "none.png")
    assert window.banner.message.startswith("No picture")
    window.pictures.save_to(entry, tmp_path / "saved.png" / "inside.png")
    assert window.banner.message.startswith("Cannot save")


def test_an_unlocked_seed_changes_and_a_typed_one_stays(window):
    set_form(window, seed=1, seed_locked=False, num_inference_steps=1)
    window.generate()
    assert read_metadata(drawn(window).path)["seed"] != 1
    entry = next(w for w in window.form.inside.winfo_children()[5].winfo_children())
    entry.delete(0, "end")
    type_into(entry, "42")
    window.generate()
    assert read_metadata(drawn(window).path)["seed"] == 42


def test_mistakes_are_shown_and_the_window_goes_on(window):
    for field, value, message in (
        ("steps", "many", "The number of steps must be a whole number, not 'many'"),
        ("size", "big", "The size 'big' is not like 192 x 128 (width x height)"),
    ):
        set_form(window, num_inference_steps=1)
        getattr(window.form, field).set(value)
        window.generate()
        assert window.run is None
        assert window.banner.message == message
    set_form(window, num_inference_steps=1, height=33, width=64)
    window.generate()
    drawn(window)
    assert "multiple of" in window.banner.message
    set_form(window, num_inference_steps=1000)
    window.generate()
    wait(window, lambda: window.run.share > 0, "a step")
    os.kill(window.worker.pid, signal.SIGKILL)
    wait(window, lambda: window.run is None, "the end")
    assert "ended unexpectedly" in window.banner.message
    window.banner._more.invoke()
    [details] = [w for w in window.winfo_children() if w.winfo_class() == "Toplevel"]
    details.winfo_children()[1].winfo_children()[1].invoke()
    assert "ended unexpectedly" in window.clipboard_get()
    details.destroy()
    set_form(window, num_inference_steps=1)
    window.generate()
    drawn(window)
    assert window.banner.message == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_many_pictures_take_no_more_memory(window):
    for count in range(30):
        set_form(
            window, ("a red apple", "a blue cat")[count % 2], seed=count, num_inference_steps=1
        )
        window.generate()
        drawn(window)
        if count == 9:
            before = memory(os.getpid())
    assert memory(os.getpid()) < before + 15


def test_both_appearances_and_sizes_show_every_part(window, data):
    from PIL import ImageGrab

    means = {}
    for appearance in ("light", "dark"):
        window.set_appearance(appearance)
        for size in ("820x560", "1200x850"):
            window.geometry(f"{size}+10+10")
            for _ in range(20):
                window.update()
                time.sleep(0.005)
            assert f"{window.winfo_width()}x{window.winfo_height()}" == size
            for part in (window.go, window.view, window.strip, window.progress):
                assert part.winfo_ismapped()
                assert part.winfo_rooty() + part.winfo_height() <= (
                    window.winfo_rooty() + window.winfo_height()
                )
        means[appearance] = np.array(ImageGrab.grab(xdisplay=os.environ["DISPLAY"])).mean()
    assert means["light"] > means["dark"] + 50
    assert load_settings(data / "settings.json")[0].appearance == "dark"


def test_the_command_ends_cleanly_during_a_run(screen, tmp_path):
    command = [sys.executable, "-m", "apps.desktop", "--data", str(tmp_path)]
    (tmp_path / "settings.json").write_text("{ damaged")
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | screen, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + PATIENCE
        names = {"settings.damaged-1.json", "settings.json"}
        while not names <= set(os.listdir(tmp_path)) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert err == ""
    assert (tmp_path / "settings.damaged-1.json").read_text() == "{ damaged"
    assert load_settings(tmp_path / "settings.json")[0].geometry


def test_without_a_screen_it_is_one_line(tmp_path):
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if sys.platform == "darwin":
        pytest.skip("a Mac always has a screen")
    env = {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    result = subprocess.run(
        [sys.executable, "-m", "apps.desktop", "--data", str(tmp_path)],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: no window can be opened")
    assert UserError.__name__ not in result.stderr
