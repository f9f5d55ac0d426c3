"""What a user does in the window."""

import itertools
import time

import numpy as np
from PIL import Image

from apps.desktop.settings import Settings
from mlx_snapgen.settings import DrawSettings, ModelChoice

PATIENCE = 120


def wait(window, condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        window.update()
        time.sleep(0.002)
        assert time.monotonic() < end, f"{what} did not come; {window.status.get()!r}"


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


CLICKS = itertools.count()


def click(window, index, button=1):
    window.strip._canvas.xview_moveto(0)
    cell = window.strip._cell
    # Seconds after the click before, which makes no double click.
    clock = int(time.monotonic() * 1000) % 2**31
    window.strip._canvas.event_generate(
        f"<Button-{button}>", x=40 + index * cell, y=40, time=clock + next(CLICKS) * 10_000
    )
    window.update()


def two_pictures(window):
    """Draws them, the second in the place of the first; (older, newer)."""
    for prompt in ("a red apple", "a blue car"):
        set_form(window, prompt, num_inference_steps=1)
        window.generate()
        drawn(window)
    return window.strip.entries[1], window.strip.entries[0]


def shows(window, entry):
    with Image.open(entry.path) as image:
        return np.array_equal(np.array(image), np.array(window.view.image))


NO_PART = ("Toplevel", "Menu", "TScrollbar", "TScale")


def assert_fits(window, page):
    """The whole page of the form is visible at 800 x 570."""
    parts = [window]
    while parts:
        part = parts.pop()
        parts += [p for p in part.winfo_children() if p.winfo_class() not in NO_PART]
        if not part.winfo_ismapped() or part.winfo_class() in ("Tk", "Menu"):
            continue
        right = part.winfo_rootx() + part.winfo_width() - window.winfo_rootx()
        bottom = part.winfo_rooty() + part.winfo_height() - window.winfo_rooty()
        assert right <= 800 and bottom <= 570, part
        if part.winfo_class() not in ("Canvas", "TNotebook"):
            assert part.winfo_width() >= part.winfo_reqwidth(), part
    column = window.form.nametowidget(page)
    assert column.inside.winfo_reqheight() <= column._canvas.winfo_height()
