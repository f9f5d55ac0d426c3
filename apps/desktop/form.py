"""The form: all settings of a picture."""

import dataclasses
import math
import re
import secrets
import tkinter as tk
from collections.abc import Callable, Sequence
from pathlib import Path
from tkinter import filedialog, ttk
from typing import Any

from apps.desktop.inputs import Inputs
from apps.desktop.settings import Settings, start_folder
from apps.desktop.start_page import StartPage, shortened
from apps.desktop.theme import Theme
from apps.desktop.widgets import Column, Slider
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.inputs import nearest_size
from mlx_snapgen.settings import (
    WIDTH_NAMES,
    DrawSettings,
    ModelChoice,
    parse_width,
    trained_size,
    trained_sizes,
)

DEFAULT_MODEL = "Default (stickers)"
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))
"""Offered shapes of pictures, width : height."""
CHOICES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Weights in memory", "quantize", {"As stored": None, "8 bits": 8, "4 bits": 4}),
    ("Few-step mode", "few_step", {"Automatic": None, "On": True, "Off": False}),
    ("Low memory", "low_memory", {"Off": False, "On": True}),
    ("Sizes", "force_size", {"Trained": False, "Exactly": True}),
    ("Modulation (EDT)", "attention_modulation", {"Off": False, "On": True}),
)
"""Label, field of `ModelChoice` or `DrawSettings`, and label -> value of the choices."""


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
        self._theme, self._load = theme, load
        self._config: Description | None = None
        self._first: str | None = None
        """The picture that gave the size its aspect ratio."""
        self.seed, self.locked = tk.StringVar(), tk.BooleanVar()
        self.model, self.model_width = tk.StringVar(), tk.StringVar()
        self.steps, self.guidance = tk.StringVar(), tk.StringVar()
        self.size, self.num_images = tk.StringVar(), tk.StringVar()
        self.text_encoders = tk.StringVar()
        self._choices = {field: tk.StringVar() for _, field, _ in CHOICES}
        self._loras: list[tuple[str, tk.StringVar]] = []
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
        self._network()
        self._model()
        self._lora_rows()
        self._more()
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
        height, width = self._size()
        names = [name.strip() for name in self.text_encoders.get().split(",") if name.strip()]
        model, revision, base_model = self._model_name()
        values = {field: choices[self._choices[field].get()] for _, field, choices in CHOICES}
        values |= {
            "prompt": self.prompt.get("1.0", "end").strip(),
            "negative_prompt": self.negative.get("1.0", "end").strip(),
            "seed": _number("seed", self.seed.get(), kind=int) or 0,
            "height": height,
            "width": width,
            "num_inference_steps": _number(
                "number of steps", self.steps.get(), kind=int, optional=True
            ),
            "guidance_scale": _number("guidance", self.guidance.get(), kind=float, optional=True),
            "num_images": _number("number of pictures", self.num_images.get(), kind=int),
            "model": model,
            "revision": revision,
            "base": base_model,
            "model_width": self.model_width.get(),
            "loras": tuple(
                (path, _number("LoRA's scale", scale.get(), kind=float))
                for path, scale in self._loras
            ),
            "text_encoders": tuple(names) or None,
        }
        values |= self.start.read()
        values["strength"] = _number("strength", values["strength"], kind=float, optional=True)
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
        self.model.set(model_label(choice))
        self.offer_models(settings.recent_models)
        self.model_width.set(choice.model_width)
        known = draw.height is not None and draw.width is not None
        self.size.set(f"{draw.width} × {draw.height}" if known else "")  # noqa: RUF001
        steps, scale = draw.num_inference_steps, draw.guidance_scale
        self.steps.set("" if steps is None else str(steps))
        self.guidance.set("" if scale is None else f"{scale:g}")
        self.num_images.set(str(draw.num_images))
        values = vars(draw) | vars(choice)
        # Old pictures have it whatever their size.
        if self._config is not None and (draw.height, draw.width) in trained_sizes(self._config):
            values["force_size"] = False
        for _, field, choices in CHOICES:
            self._choices[field].set(_key(choices, values[field]))
        self.text_encoders.set(", ".join(choice.text_encoders or ()))
        self._loras = [(path, tk.StringVar(value=f"{w:g}")) for path, w in choice.loras]
        self._show_loras()
        self.start.show(draw, settings.folder)
        self._first = next(iter(self.start.paths), None)
        self._update_start()
        if self._config is not None:
            self._fill(self._config)
        self._update_negative()

    def offer_models(self, names: Sequence[str]) -> None:
        """The names in the list of models, below the default."""
        self._model_field.configure(values=[DEFAULT_MODEL, *names])

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
        for name, button in self._widths.items():
            held = parse_width(name).share in config.widths
            button.state(["!disabled" if held else "disabled"])
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
            height, width = like_picture(
                self._config, first, pixels=math.prod(self._config.image_size)
            )
            sizes.insert(0, f"Like the picture: {width} × {height}")  # noqa: RUF001
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
            chosen = self._size()
        except UserError:
            chosen = None, None
        pixels = math.prod(side or own for side, own in zip(chosen, config.image_size, strict=True))
        height, width = like_picture(config, first, pixels=pixels)
        self.size.set(f"{width} × {height}")  # noqa: RUF001

    def new_seed(self) -> None:
        """A random seed."""
        self.seed.set(str(secrets.randbelow(2**32)))

    def _fill(self, config: Description) -> None:
        """Fill empty fields with the model's own numbers."""
        sampler = config.sampler_for(None, None)
        height, width = config.image_size
        for variable, value in (
            (self.steps, str(sampler.num_inference_steps)),
            (self.guidance, f"{sampler.guidance_scale:g}"),
            (self.size, f"{width} × {height}"),  # noqa: RUF001
        ):
            if not variable.get().strip():
                variable.set(value)

    def _size(self) -> tuple[int, int] | tuple[None, None]:
        """The (height, width) of the form, if any."""
        size = self.size.get().strip()
        if not size:
            return None, None
        found = re.search(r"(?<![0-9])([0-9]{1,9})\s*[x×*]\s*([0-9]{1,9})\s*$", size)  # noqa: RUF001
        if not found:
            raise UserError(f"the size '{size[:40]}' is not like 192 x 128 (width x height)")
        return int(found[2]), int(found[1])

    def _model_name(self) -> tuple[str | None, str | None, str | None]:
        """Model, revision and base of the form."""
        name = self.model.get().strip()
        if name in ("", DEFAULT_MODEL):
            return None, None, None
        file, is_file, rest = name.partition(".safetensors ")
        source, revision = rest.strip() if is_file else name, None
        if "@" in source and not expanded(source).is_dir():
            source, _, revision = source.rpartition("@")
        if is_file:
            return f"{file}{is_file.strip()}", revision or None, source
        return source, revision or None, None

    # --- fields ---------------------------------------------------------------------------------

    def _heading(self, text: str) -> None:
        ttk.Label(self.inside, text=text, style="Heading.TLabel").grid(sticky="w", pady=(10, 4))

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
        self._heading(label)
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
        self._heading("Seed")
        row = ttk.Frame(self.inside)
        row.grid(sticky="ew")
        row.columnconfigure(0, weight=1)
        self.seed_entry = entry = ttk.Entry(row, textvariable=self.seed, width=12)
        entry.grid(row=0, column=0, sticky="ew")
        # A typed seed is kept.
        entry.bind("<Key>", lambda e: e.char.isdigit() and self.locked.set(True), add=True)
        ttk.Button(row, text="Roll", width=5, command=self.new_seed).grid(row=0, column=1, padx=6)
        ttk.Checkbutton(row, text="Keep", variable=self.locked).grid(row=0, column=2)

    def _network(self) -> None:
        self._heading("Network width")
        row = ttk.Frame(self.inside)
        row.grid(sticky="ew")
        self._widths = {}
        for column, name in enumerate(WIDTH_NAMES):
            row.columnconfigure(column, weight=1, uniform="width")
            button = ttk.Radiobutton(
                row,
                text=name.capitalize(),
                value=name,
                variable=self.model_width,
                style="Toolbutton",
            )
            button.grid(row=0, column=column, sticky="ew", padx=(0, 2))
            self._widths[name] = button

    def _picture(self) -> None:
        self._heading("Sampling")
        for label, variable, low, high, by in (
            ("Steps", self.steps, 1, 50, 1),
            ("Guidance", self.guidance, 1, 10, 0.5),
        ):
            slider = Slider(self.inside, label, variable=variable, low=low, high=high, by=by)
            slider.grid(sticky="ew", pady=(0, 6))
            self.sliders[label] = slider
        row = self._row("Size")
        self._size_field = ttk.Combobox(row, textvariable=self.size, width=19)
        self._size_field.grid(row=0, column=1, sticky="e")
        self._size_field.bind(
            "<<ComboboxSelected>>", lambda _: self.size.set(self.size.get().partition(": ")[2])
        )
        row = self._row("Pictures")
        ttk.Spinbox(row, textvariable=self.num_images, from_=1, to=64, width=6).grid(
            row=0, column=1, sticky="e"
        )

    def _lora_rows(self) -> None:
        row = self._row("LoRA", heading=True)
        ttk.Button(row, text="Add…", command=self._add_lora).grid(row=0, column=1, sticky="e")
        self._lora_frame = ttk.Frame(self.inside)
        self._lora_frame.grid(sticky="ew")
        self._lora_frame.columnconfigure(0, weight=1)

    def _show_loras(self) -> None:
        for child in self._lora_frame.winfo_children():
            child.destroy()
        for i, (path, scale) in enumerate(self._loras):
            name = ttk.Label(self._lora_frame, text=shortened(Path(path).stem, 20))
            name.grid(row=i, column=0, sticky="w")
            ttk.Spinbox(
                self._lora_frame, textvariable=scale, from_=0, to=2, increment=0.1, width=5
            ).grid(row=i, column=1, padx=6, pady=2)
            ttk.Button(
                self._lora_frame,
                text="Remove",
                command=lambda pair=(path, scale): self._drop_lora(pair),
            ).grid(row=i, column=2)
        if not self._loras:
            # An empty frame would keep its former height.
            self._lora_frame.configure(height=1)

    def _add_lora(self) -> None:
        last = self._loras[-1][0] if self._loras else ""
        path = filedialog.askopenfilename(
            parent=self,
            title="LoRA",
            initialdir=start_folder(str(Path(last).parent) if last else ""),
            filetypes=[("LoRA", "*.safetensors")],
        )
        if path:
            self.add_lora(path)

    def add_lora(self, path: str, scale: float = 1.0) -> None:
        """Add a LoRA."""
        self._loras.append((path, tk.StringVar(value=f"{scale:g}")))
        self._show_loras()

    def _drop_lora(self, pair: tuple[str, tk.StringVar]) -> None:
        self._loras.remove(pair)
        self._show_loras()

    def _model(self) -> None:
        row = self._row("Model", heading=True)
        ttk.Button(row, text="Folder…", command=self._choose_folder).grid(
            row=0, column=1, sticky="e"
        )
        self._model_field = ttk.Combobox(self.inside, textvariable=self.model)
        self._model_field.grid(sticky="ew")
        self._model_field.bind("<<ComboboxSelected>>", lambda _: self._load())
        self._model_field.bind("<Return>", lambda _: self._load())
        ttk.Label(
            self.inside, text="A folder, or owner/name on Hugging Face", style="Muted.TLabel"
        ).grid(sticky="w", pady=(3, 0))

    def _choose_folder(self) -> None:
        model, *_ = self._model_name()
        parent = expanded(model).parent if model is not None else Path()
        folder = filedialog.askdirectory(
            parent=self,
            title="Model folder",
            initialdir=start_folder(str(parent) if parent.is_absolute() else ""),
            mustexist=True,
        )
        if folder:
            self.model.set(folder)
            self._load()

    def _more(self) -> None:
        self._heading("Mode")
        for label, field, choices in CHOICES:
            row = self._row(label)
            box = ttk.Combobox(
                row,
                textvariable=self._choices[field],
                values=list(choices),
                state="readonly",
                width=10,
            )
            box.grid(row=0, column=1, sticky="e")
        row = self._row("Text encoders")
        ttk.Entry(row, textvariable=self.text_encoders, width=12).grid(row=0, column=1, sticky="e")

    def _row(self, label: str, heading: bool = False) -> ttk.Frame:
        row = ttk.Frame(self.inside)
        row.grid(sticky="ew", pady=(10, 4) if heading else 2)
        row.columnconfigure(0, weight=1)
        style = "Heading.TLabel" if heading else "TLabel"
        ttk.Label(row, text=label, style=style).grid(row=0, column=0, sticky="w")
        return row


class TextField(tk.Text):
    """A text of several lines."""

    muted = False
    """Whether the theme grays it out."""


def model_label(choice: ModelChoice) -> str:
    """How the form names a model."""
    if choice.model is None:
        return DEFAULT_MODEL
    name = choice.model if choice.base is None else f"{choice.model} {choice.base}"
    return name + ("" if choice.revision is None else f"@{choice.revision}")


def offered_sizes(config: Description) -> list[tuple[int, int]]:
    """The (height, width) that a model was trained on, or of `RATIOS` with its default area."""
    area, unit = math.prod(config.image_size), config.size_unit

    def side(ratio: float) -> int:
        return max(unit, round((area * ratio) ** 0.5 / unit) * unit)

    sizes = [(side(down / across), side(across / down)) for across, down in RATIOS]
    return list(dict.fromkeys(trained_sizes(config) or sizes))


def like_picture(config: Description, size: tuple[int, int], *, pixels: int) -> tuple[int, int]:
    """The (height, width) with about a picture's aspect ratio that a model draws.

    Args:
        size: (height, width) of the picture.
        pixels: wanted, unless the model was trained on certain sizes.
    """
    if config.trained_sizes:
        return trained_size(config, *size)
    return nearest_size(size, pixels=pixels, unit=config.size_unit)


def size_label(width: int, height: int) -> str:
    """A size, with the ratio that it has."""
    kind = "Square" if width == height else "Landscape" if width > height else "Portrait"
    divisor = math.gcd(width, height)
    ratio = f" {width // divisor}:{height // divisor}"
    for across, down in RATIOS:
        if width * down != height * across and abs(width * down / (height * across) - 1) < 0.03:
            ratio = f", about {across}:{down}"
    shown = kind if width == height else kind + ratio
    return f"{shown}: {width} × {height}"  # noqa: RUF001


def _focus(widget: tk.Misc | None) -> str:
    if widget is not None:
        widget.focus_set()
    return "break"


def _key(choices: dict, value) -> str:
    return next((key for key, v in choices.items() if v == value), next(iter(choices)))


def _number(name: str, text: str, *, kind: type, optional: bool = False):
    """`text` as a number; `UserError` names the field."""
    text = text.strip().replace(",", ".") if kind is float else text.strip()
    if not text and optional:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"the {name} must be {what}, not '{text}'")
    return value
