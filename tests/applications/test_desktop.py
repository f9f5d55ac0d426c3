"""The window, driven as a user would in a virtual screen, with real drawing by a tiny model."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from apps.desktop.fields import model_label, offered_sizes, read_model, size_label
from apps.desktop.history import History
from apps.desktop.run import Run
from apps.desktop.settings import Settings, load_settings, save_settings
from apps.desktop.wording import in_window
from apps.worker.messages import Downloading, Loaded, Notice, Progress
from mlx_snapgen.errors import UserError
from mlx_snapgen.metadata import encode_png, read_metadata
from mlx_snapgen.settings import DrawSettings, ModelChoice
from tests.applications.windows import (
    PATIENCE,
    assert_fits,
    click,
    drawn,
    set_form,
    shows,
    two_pictures,
    type_into,
    wait,
)
from tests.tiny import TEACHER, memory

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("damaged", ["", "{", "[]", "\x00\x00", '{"prompt": "a', "[" * 100_000])
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
    assert history.skipped == ["20200101-000000000000_broken.png"]
    history.delete(entry)
    assert [e.name for e, _ in history.load()] == ["picture-3", "picture-2"]


def test_a_picture_with_a_huge_header_is_skipped(tmp_path):
    history = History(tmp_path / "history")
    history.add("small", encode_png(Image.new("RGB", (8, 8))))
    png = bytearray(encode_png(Image.new("RGB", (8, 8))))
    png[16:24] = struct.pack(">II", 14000, 14000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    history.add("huge-14000", bytes(png))
    history.add("huge-9000", encode_png(Image.new("1", (9000, 9000))))
    assert [e.name for e, _ in history.load()] == ["small"]
    assert [name.partition("_")[2] for name in history.skipped] == [
        "huge-9000.png",
        "huge-14000.png",
    ]


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
    click(window, 0)
    assert window.form.read(window.settings).draw.prompt == "something else"
    window.event_generate("<Control-u>")
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


def test_commands_act_on_the_picture_that_is_shown(window, monkeypatch, tmp_path):
    older, newer = two_pictures(window)
    monkeypatch.setattr(window.picture_menu, "tk_popup", lambda *_: None)
    saved = tmp_path / "saved.png"
    from apps.desktop import pictures

    monkeypatch.setattr(pictures.filedialog, "asksaveasfilename", lambda **_: str(saved))
    for entry, index, button in ((older, 1, 3), (newer, 0, 3), (older, 1, 1)):
        click(window, index, button)
        assert shows(window, entry)
        window.pictures.save()
        assert saved.read_bytes() == entry.path.read_bytes()

    # A file that is not in the history.
    other = tmp_path / "my_cat.png"
    other.write_bytes(newer.path.read_bytes())
    window.pictures.open_picture(other)
    window.pictures.save()
    assert saved.read_bytes() == other.read_bytes()
    assert window.strip.selected.name == "my_cat"
    monkeypatch.setattr(pictures.messagebox, "askokcancel", lambda *_, **__: True)
    window.pictures.delete()
    assert other.exists() and older.path.exists() and newer.path.exists()
    assert window.banner.message == "My_cat.png is not in the history"

    # An estimate is no picture yet. A picture clicked meanwhile stays.
    set_form(window, num_inference_steps=1000)
    window.generate()
    wait(window, lambda: window.run.share > 0 and window.strip.selected is None, "an estimate")
    assert all(button.instate(["disabled"]) for button in window._actions)
    click(window, 1)
    share = window.run.share
    wait(window, lambda: window.run.share > share, "a further step")
    assert shows(window, older) and window.strip.selected == older
    window.cancel()
    wait(window, lambda: window.run is None, "the end")
    assert shows(window, older)


def test_a_click_on_a_thumbnail_changes_no_field(window):
    older, _ = two_pictures(window)
    set_form(window, "half a pro", seed=3, seed_locked=False)
    before = window.form.read(window.settings)
    type_into(window.form.prompt, "m")
    click(window, 1)
    assert shows(window, older)
    found = window.form.read(window.settings)
    assert found.draw.prompt in ("half a prom", "mhalf a pro")
    assert (found.draw.seed, found.seed_locked) == (before.draw.seed, False)
    typed = found.draw.prompt
    window.strip._canvas.event_generate("<Return>")
    window.update()
    assert window.form.read(window.settings).draw.prompt == "a red apple"
    window.form.prompt.edit_undo()
    assert window.form.prompt.get("1.0", "end").strip() == typed


def test_select_all_selects_all(window):
    set_form(window, "two words", seed=12345)
    fields = (window.form.prompt, "two words"), (window.form.seed_entry, "12345")
    for widget, expected in fields:
        widget.focus_force()
        widget.update()
        widget.event_generate("<Control-a>")
        widget.update()
        assert widget.selection_get().strip() == expected


def test_only_what_a_model_can_do_is_offered(window, components):
    """A distilled public model has no guidance and takes no negative prompt."""
    form = window.form
    form.adopt(replace(TEACHER, few_step=TEACHER.schedule), forget=True)
    assert form.guidance.get() == "1" and form.size.get() == "1024 × 1024"  # noqa: RUF001
    assert str(form.negative.cget("state")) == "disabled"
    assert form.sliders["Guidance"].entry.instate(["disabled"])
    assert form.sliders["Steps"].entry.instate(["!disabled"])
    form.adopt(components.config, forget=True)
    assert form.guidance.get() == "3"
    assert form.sliders["Guidance"].entry.instate(["!disabled"])


def test_the_negative_prompt_is_grey_without_guidance(window, components):
    set_form(window, negative_prompt="cats", guidance_scale=1.0, num_inference_steps=1)
    window.banner.hide()
    assert str(window.form.negative.cget("state")) == "disabled"
    window.generate()
    assert read_metadata(drawn(window).path)["negative_prompt"] == ""
    assert window.banner.message == ""
    assert window.form.read(window.settings).draw.negative_prompt == "cats"
    window.form.guidance.set("2")
    assert str(window.form.negative.cget("state")) == "normal"
    window.generate()
    assert read_metadata(drawn(window).path)["negative_prompt"] == "cats"


@pytest.mark.parametrize(("area", "unit"), [(128**2, 32), (256**2, 16), (1024**2, 32)])
def test_labels_of_sizes_are_true(area, unit):
    side = math.isqrt(area)
    config = SimpleNamespace(image_size=(side, side), size_unit=unit, trained_sizes=())
    for height, width in offered_sizes(config):
        label = size_label(width, height)
        width, height = map(int, re.search(r": (\d+) . (\d+)$", label).groups())
        assert width % unit == height % unit == 0
        if ratio := re.search(r"(about )?(\d+):(\d+):", label):
            error = width * int(ratio[3]) / (height * int(ratio[2])) - 1
            assert abs(error) < (0.03 if ratio[1] else 1e-9), label
        kind = label.split()[0].strip(",:")
        assert kind == ("Square" if width == height else
                        "Landscape" if width > height else "Portrait")  # fmt: skip


def test_only_the_sizes_of_the_training_are_offered():
    config = SimpleNamespace(
        image_size=(256, 256), size_unit=32, trained_sizes=((256, 256), (192, 320), (384, 256))
    )
    labels = [size_label(width, height) for height, width in offered_sizes(config)]
    names = ("Square", "Landscape 5:3", "Portrait 2:3")
    assert [label.partition(": ")[0] for label in labels] == list(names)
    assert [re.findall(r"\d{3}", label) for label in labels] == [
        ["256", "256"],
        ["320", "192"],
        ["256", "384"],
    ]


def test_a_small_screen_shows_the_whole_form(window):
    # The menu bar is 30 pixels high.
    window.geometry("800x570+0+0")
    set_form(window)
    for page in window.form.tabs():
        window.form.select(page)
        for _ in range(20):
            window.update()
            time.sleep(0.005)
        assert_fits(window, page)
    window.form.select(0)


def test_a_model_that_failed_does_not_stay_chosen(window, model_folder, data):
    set_form(window)
    window.load_model()
    wait(window, lambda: window.run is None, "the model")
    window.form.model.set("/no/such/model")
    window.load_model()
    wait(window, lambda: window.run is None, "the end")
    assert window.banner.message == "No model folder /no/such/model"
    for settings in (window.form.read(window.settings), load_settings(data / "settings.json")[0]):
        assert settings.choice.model == str(model_folder)
        assert settings.recent_models == (str(model_folder),)
    window.form.model.set("/no/such/model")
    window.generate()
    wait(window, lambda: window.run is None, "the end")
    assert window.form.model.get() == str(model_folder)
    set_form(window, num_inference_steps=1)
    window.generate()
    drawn(window)


def test_a_model_of_two_parts_has_one_name():
    for choice in (
        ModelChoice("a b.safetensors", base="owner/name"),
        ModelChoice("~/a.safetensors", revision="main", base="owner/name"),
        ModelChoice("owner/name", revision="v1"),
        ModelChoice("folder/name"),
        ModelChoice("a.safetensors"),
        ModelChoice(),
    ):
        parts = (choice.model, choice.revision, choice.base)
        assert read_model(model_label(choice)) == parts


def test_the_model_page_has_memory_and_sizes(window, data):
    set_form(window, num_inference_steps=1, height=64, width=96)
    window.form.model_page.choices["low_memory"].set("On")
    window.form.model_page.choices["force_size"].set("Exactly")
    window.generate()
    values = read_metadata(drawn(window).path)
    assert values["force_size"] is True
    saved = load_settings(data / "settings.json")[0]
    assert saved.choice.low_memory and saved.draw.force_size
    restored, _ = saved.restored(window.strip.entries[0].path, window.inputs)
    assert restored.choice.low_memory
    set_form(window)
    assert window.form.model_page.choices["force_size"].get() == "Trained"


def test_the_words_of_the_model(window):
    set_form(window)
    window.show_words()
    [dialog] = [w for w in window.winfo_children() if w.winfo_class() == "Toplevel"]
    [text] = [w for w in dialog.winfo_children() if w.winfo_class() == "Text"]
    assert "apple" in text.get("1.0", "end") and text.cget("wrap") == "word"
    dialog.destroy()
    words, window._words = window._words, None
    window.show_words()
    assert window.banner.message.endswith("takes any words")
    window._words = words


def test_all_notes_of_a_picture_are_shown(window):
    set_form(window, "a zebra", num_inference_steps=1)
    window.generate()
    window.worker._deliver(Notice(window.run.job, "drawn at 64 x 32; --force-size draws any size"))
    drawn(window)
    first, second = window.banner.message.splitlines()
    assert first.startswith("Drawn at 64 x 32; Sizes: Exactly")
    assert second.startswith("The prompt names nothing that this model can draw")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "drawn at 128 x 128; --force-size draws any size, badly",
            "drawn at 128 x 128; Sizes: Exactly on the page Model draws any size, badly",
        ),
        ("--vocabulary lists all words", "Help, Words of the Model lists all words"),
        (
            "choose --model-width tiny or --low-memory or --quantize 4",
            "choose Network width: tiny or Low memory: On or Weights in memory: 4 bits",
        ),
        ("with --model-width or --model-widths", "with Network width"),
        ("quantize it with convert.from_torch --quantize", None),
        ("is not --lowmemory, nor a--base", None),
    ],
)
def test_messages_name_what_the_window_has(text, shown):
    assert in_window(text) == (shown or text)


def test_another_model_in_a_picture_is_asked_for(window, monkeypatch, tmp_path):
    from apps.desktop import pictures

    set_form(window, "here")
    used = window.form.read(window.settings).choice
    older, _ = two_pictures(window)
    lora = {"path": "/their/style.safetensors", "weight": 0.5}
    values = read_metadata(older.path) | {"model": "owner/other", "loras": [lora], "seed": 77}
    path = tmp_path / "strange.png"
    path.write_bytes(encode_png(Image.new("RGB", (8, 8)), values))
    for answer, prompt, model, loras in (
        (None, "here", used.model, ()),
        (False, "a red apple", used.model, ()),
        (True, "a red apple", "owner/other", (("/their/style.safetensors", 0.5),)),
    ):
        asked = []
        monkeypatch.setattr(
            pictures.messagebox,
            "askyesnocancel",
            lambda *words, answer=answer, asked=asked, **_: (asked.append(words[1]), answer)[1],
        )
        set_form(window, "here")
        window.settings = replace(window.settings, choice=used)
        window.pictures.open_picture(path)
        found = window.form.read(window.settings)
        assert (found.draw.prompt, found.choice.model) == (prompt, model)
        assert found.choice.loras == loras
        assert "owner/other, the LoRA /their/style.safetensors" in asked[0]
        assert window.run is None
    # The window's own pictures are used without a question.
    monkeypatch.setattr(pictures.messagebox, "askyesnocancel", None)
    set_form(window, model_width="full")
    window.form.model.set("owner/another")
    click(window, 1)
    window.pictures.use_settings()
    assert window.form.read(window.settings).choice == used


def test_dialogs_start_in_the_folder_used_last(window, monkeypatch, tmp_path):
    from apps.desktop import pictures

    asked = []

    def ask(**options):
        asked.append(options["initialdir"])
        return str(tmp_path / "last" / "x.png")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(pictures.filedialog, "asksaveasfilename", ask)
    monkeypatch.setattr(pictures.filedialog, "askopenfilename", ask)
    window.settings = replace(window.settings, folder="")
    (tmp_path / "last").mkdir()
    window.strip.select(window.strip.entries[0])
    window.pictures.save()
    window.pictures.open()
    (tmp_path / "Pictures").mkdir()
    window.settings = replace(window.settings, folder=str(tmp_path / "gone"))
    window.pictures.save()
    assert asked == [str(tmp_path), str(tmp_path / "last"), str(tmp_path / "Pictures")]


def test_an_unlocked_seed_changes_and_a_typed_one_stays(window):
    set_form(window, seed=1, seed_locked=False, num_inference_steps=1)
    window.generate()
    assert read_metadata(drawn(window).path)["seed"] != 1
    window.form.seed_entry.delete(0, "end")
    type_into(window.form.seed_entry, "42")
    window.generate()
    assert read_metadata(drawn(window).path)["seed"] == 42


def test_mistakes_are_shown_and_the_window_goes_on(window):
    for field, value, message in (
        ("steps", "many", "The number of steps must be a whole number, not 'many'"),
        ("size", "big", "The size 'big' is not like 192 x 128 (width x height)"),
        (
            "size",
            "9" * 5000 + " x 1",
            f"The size '{'9' * 40}' is not like 192 x 128 (width x height)",
        ),
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
    set_form(window, num_inference_steps=1, height=16384, width=16384)
    pid = window.worker.pid
    window.generate()
    drawn(window)
    assert "choose a smaller size" in window.banner.message
    assert window.worker.pid == pid
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
        for size in ("640x480", "1200x850"):
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
