"""The form: all settings of a picture."""

import dataclasses
import math
import secrets
import tkinter as tk
from collections.abc import Callable
from tkinter import ttk

from apps.desktop.fields import (
    like_picture,
    offered_sizes,
    read_number,
    read_size,
    size_label,
    size_text,
)
from apps.desktop.inputs import Inputs
from apps.desktop.model_page import ModelPage
from apps.desktop.settings import Settings
from apps.desktop.start_page import StartPage
from apps.desktop.theme import Theme
from apps.desktop.widgets import Column, Slider, heading, labeled_row
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import DrawSettings, trained_sizes


class Form(ttk.Notebook):
    """Shows `Settings` in fields, on three pages, and reads them.

    Args:
        load: called when the user selects another model.
        inputs, paint, paste, tell: see `StartPage`.
    """

    def __init__(
        self,
        master: tk.Misc,
        theme: Theme,
        *,
        load: Callable[[], None],
        inputs: Inputs,
        paint: Callable[[], None],
        paste: Callable[[], None],
        tell: Callable[[str], None],
    ):
        super().__init__(master)
        self._theme = theme
        self._config: Description | None = None
        self._first: str | None = None
        """The picture that gave the size its aspect ratio."""
        self.seed, self.locked = tk.StringVar(), tk.BooleanVar()
        self.model = tk.StringVar()
        self.steps, self.guidance = tk.StringVar(), tk.StringVar()
        self.size, self.num_images = tk.StringVar(), tk.StringVar()
        self.sliders: dict[str, Slider] = {}
        pages = [self._page("Picture")]
        self._texts()
        self._seed()
        self._picture()
        pages.append(self._page("Start from"))
        self.start = StartPage(
            self.inside,
            theme,
            inputs=inputs,
            paint=paint,
            paste=paste,
            tell=tell,
            changed=self._picture_chosen,
        )
        self.start.grid(sticky="ew")
        pages.append(self._page("Model"))
        self.model_page = ModelPage(self.inside, model=self.model, load=load)
        self.model_page.grid(sticky="ew")
        for page in pages:
            page.bind_wheel()
        self.guidance.trace_add("write", lambda *_: self._update_negative())

    def _page(self, name: str) -> Column:
        """A new page; the fields that are made next go into `self.inside`."""
        page = Column(self, width=300)
        page.inside.configure(padding=(14, 4))
        page.inside.columnconfigure(0, weight=1)
        self.inside = page.inside
        self.add(page, text=name)
        return page

    # --- reading and showing --------------------------------------------------------------------

    def read(self, base: Settings) -> Settings:
        """`base` with the values of the form; `UserError` names a wrong field."""
        height, width = read_size(self.size.get())
        values = {
            "prompt": self.prompt.get("1.0", "end").strip(),
            "negative_prompt": self.negative.get("1.0", "end").strip(),
            "seed": read_number("seed", self.seed.get(), kind=int) or 0,
            "height": height,
            "width": width,
            "num_inference_steps": read_number(
                "number of steps", self.steps.get(), kind=int, optional=True
            ),
            "guidance_scale": read_number(
                "guidance", self.guidance.get(), kind=float, optional=True
            ),
            "num_images": read_number("number of pictures", self.num_images.get(), kind=int),
        }
        values |= self.model_page.read() | self.start.read()
        draw, choice = (
            dataclasses.replace(part, **{k: v for k, v in values.items() if k in vars(part)})
            for part in (base.draw, base.choice)
        )
        return dataclasses.replace(base, draw=draw, choice=choice, seed_locked=self.locked.get())

    def show(self, settings: Settings) -> None:
        """Fill all fields."""
        draw, choice = settings.draw, settings.choice
        self.negative.configure(state="normal")
        for text, value in ((self.prompt, draw.prompt), (self.negative, draw.negative_prompt)):
            # Undo brings back what was typed before.
            text.edit_separator()
            text.replace("1.0", "end", value)
            text.edit_separator()
        self.seed.set(str(draw.seed))
        self.locked.set(settings.seed_locked)
        height, width = draw.height, draw.width
        self.size.set("" if height is None or width is None else size_text(height, width))
        steps, scale = draw.num_inference_steps, draw.guidance_scale
        self.steps.set("" if steps is None else str(steps))
        self.guidance.set("" if scale is None else f"{scale:g}")
        self.num_images.set(str(draw.num_images))
        # Old pictures have it whatever their size.
        if self._config is not None and (height, width) in trained_sizes(self._config):
            draw = dataclasses.replace(draw, force_size=False)
        self.model_page.show(choice, draw)
        self.model_page.offer_models(settings.recent_models)
        self.start.show(draw, settings.folder)
        self._first = next(iter(self.start.paths), None)
        self._update_start()
        if self._config is not None:
            self._fill(self._config)
        self._update_negative()

    def effective(self, draw: DrawSettings) -> DrawSettings:
        """`draw` without what has no effect on the chosen model."""
        if self.negative.muted:
            draw = dataclasses.replace(draw, negative_prompt="")
        if not self.start.can_edit:
            draw = dataclasses.replace(draw, edit=())
        return draw

    def start_from(self, path: str) -> None:
        """Start from a picture, in its aspect ratio if the model draws all sizes; show its page."""
        if self.start.set_picture(path):
            self.select(1)

    def edit_picture(self, path: str) -> None:
        """Add a picture to edit and show its page."""
        if self.start.add_edit(path):
            self.select(1)

    def adopt(self, config: Description, forget: bool) -> None:
        """Offer what a loaded model can do; `forget` clears the previous model's numbers."""
        self._config = config
        if forget:
            for variable in (self.steps, self.guidance, self.size):
                variable.set("")
        self.model_page.offer_widths(config)
        can = config.abilities()
        self.sliders["Guidance"].enable(can.guidance)
        if not can.guidance:
            self.guidance.set("1")
        self.start.offer_edit(can.edit)
        self._fill(config)
        if forget:
            self._take_ratio()
        self._update_negative()
        self._update_start()

    def _update_start(self) -> None:
        """Offer sizes, the one like the picture to start from first, and mark its page."""
        started = self.start.image is not None or (self.start.can_edit and self.start.edit)
        self.tab(1, text="Start from ●" if started else "Start from")
        if self._config is None:
            return
        sizes = [size_label(width, height) for height, width in offered_sizes(self._config)]
        if (first := self.start.first_size) is not None:
            like = like_picture(self._config, first, pixels=math.prod(self._config.image_size))
            sizes.insert(0, f"Like the picture: {size_text(*like)}")
        self._size_field.configure(values=sizes)

    def _picture_chosen(self) -> None:
        """Choose the size that is like a new picture, if the model draws several sizes well."""
        before, self._first = self._first, next(iter(self.start.paths), None)
        self._update_start()
        if before != self._first:
            self._take_ratio()

    def _take_ratio(self) -> None:
        """Choose the size that is like the picture, if possible with as many pixels as before."""
        config, first = self._config, self.start.first_size
        if config is None or first is None:
            return
        if not (config.trained_sizes or config.abilities().any_size):
            return
        try:
            chosen = read_size(self.size.get())
        except UserError:
            chosen = None, None
        pixels = math.prod(side or own for side, own in zip(chosen, config.image_size, strict=True))
        self.size.set(size_text(*like_picture(config, first, pixels=pixels)))

    def new_seed(self) -> None:
        """A random seed."""
        self.seed.set(str(secrets.randbelow(2**32)))

    def _fill(self, config: Description) -> None:
        """Fill empty fields with the model's own numbers."""
        sampler = config.sampler_for(None, None)
        for variable, value in (
            (self.steps, str(sampler.num_inference_steps)),
            (self.guidance, f"{sampler.guidance_scale:g}"),
            (self.size, size_text(*config.image_size)),
        ):
            if not variable.get().strip():
                variable.set(value)

    # --- fields ---------------------------------------------------------------------------------

    def _texts(self) -> None:
        self.prompt = self._text("Prompt", 3)
        self.negative = self._text("Negative prompt", 2)
        self._no_effect = ttk.Label(self.inside, style="Muted.TLabel")
        self._no_effect.grid(row=self.negative.grid_info()["row"] - 1, sticky="e", pady=(8, 0))

    def _update_negative(self) -> None:
        """Gray the negative prompt out where it has no effect."""
        try:
            scale = float(self.guidance.get().replace(",", "."))
        except ValueError:
            scale = None
        self.negative.muted = scale == 1
        self.negative.configure(state="disabled" if scale == 1 else "normal")
        self._no_effect.configure(text="off at guidance 1" if scale == 1 else "")
        self._theme.paint(self.negative)

    def _text(self, label: str, lines: int) -> "TextField":
        heading(self.inside, label)
        text = TextField(
            self.inside,
            height=lines,
            width=20,
            wrap="word",
            undo=True,
            font="TkDefaultFont",
            relief="flat",
            highlightthickness=1,
            padx=6,
            pady=5,
        )
        text.grid(sticky="ew")
        # Tab moves to the next field instead of inserting a tab.
        text.bind("<Tab>", lambda _: _focus(text.tk_focusNext()))
        text.bind("<Shift-Tab>", lambda _: _focus(text.tk_focusPrev()))
        return text

    def _seed(self) -> None:
        heading(self.inside, "Seed")
        row = ttk.Frame(self.inside)
        row.grid(sticky="ew")
        row.columnconfigure(0, weight=1)
        self.seed_entry = entry = ttk.Entry(row, textvariable=self.seed, width=12)
        entry.grid(row=0, column=0, sticky="ew")
        # A typed seed is kept.
        entry.bind("<Key>", lambda e: e.char.isdigit() and self.locked.set(True), add=True)
        ttk.Button(row, text="Roll", width=5, command=self.new_seed).grid(row=0, column=1, padx=6)
        ttk.Checkbutton(row, text="Keep", variable=self.locked).grid(row=0, column=2)

    def _picture(self) -> None:
        heading(self.inside, "Sampling")
        for label, variable, low, high, by in (
            ("Steps", self.steps, 1, 50, 1),
            ("Guidance", self.guidance, 1, 10, 0.5),
        ):
            slider = Slider(self.inside, label, variable=variable, low=low, high=high, by=by)
            slider.grid(sticky="ew", pady=(0, 6))
            self.sliders[label] = slider
        row = labeled_row(self.inside, "Size")
        self._size_field = ttk.Combobox(row, textvariable=self.size, width=19)
        self._size_field.grid(row=0, column=1, sticky="e")
        self._size_field.bind(
            "<<ComboboxSelected>>", lambda _: self.size.set(self.size.get().partition(": ")[2])
        )
        row = labeled_row(self.inside, "Pictures")
        ttk.Spinbox(row, textvariable=self.num_images, from_=1, to=64, width=6).grid(
            row=0, column=1, sticky="e"
        )


class TextField(tk.Text):
    """A text of several lines."""

    muted = False
    """Whether the theme grays it out."""


def _focus(widget: tk.Misc | None) -> str:
    if widget is not None:
        widget.focus_set()
    return "break"
