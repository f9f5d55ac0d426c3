"""The form's page for the model: which one, how it is kept in memory, and the mode it draws in."""

import tkinter as tk
from collections.abc import Callable, Sequence
from pathlib import Path
from tkinter import filedialog, ttk
from typing import Any

from apps.desktop.fields import DEFAULT_MODEL, model_label, read_model, read_number
from apps.desktop.settings import start_folder
from apps.desktop.widgets import heading, labeled_row, toggle
from apps.desktop.wording import shortened
from mlx_snapgen.description import Description
from mlx_snapgen.files import expanded
from mlx_snapgen.settings import WIDTH_NAMES, DrawSettings, ModelChoice, parse_width

CHOICES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Weights in memory", "quantize", {"As stored": None, "8 bits": 8, "4 bits": 4}),
    ("Few-step mode", "few_step", {"Automatic": None, "On": True, "Off": False}),
    ("Low memory", "low_memory", {"Off": False, "On": True}),
    ("Sizes", "force_size", {"Trained": False, "Exactly": True}),
    ("Modulation (EDT)", "attention_modulation", {"Off": False, "On": True}),
)
"""Label, field of `ModelChoice` or `DrawSettings`, and label -> value of the choices."""


class ModelPage(ttk.Frame):
    """Shows and reads `ModelChoice`, and the fields of `DrawSettings` in `CHOICES`.

    Args:
        model: name of the model, as `model_label` writes it.
        load: called when the user selects another model.
    """

    def __init__(self, master: tk.Misc, *, model: tk.StringVar, load: Callable[[], None]):
        super().__init__(master)
        self._model, self._load = model, load
        self._width, self._text_encoders = tk.StringVar(), tk.StringVar()
        self.choices = {field: tk.StringVar() for _, field, _ in CHOICES}
        self._loras: list[tuple[str, tk.StringVar]] = []
        self.columnconfigure(0, weight=1)
        self._width_part()
        self._model_part()
        self._lora_part()
        self._mode_part()

    # --- reading and showing --------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        """The fields of `ModelChoice` and `DrawSettings`; `UserError` names a wrong one."""
        model, revision, base = read_model(self._model.get())
        names = [name.strip() for name in self._text_encoders.get().split(",") if name.strip()]
        return {field: choices[self.choices[field].get()] for _, field, choices in CHOICES} | {
            "model": model,
            "revision": revision,
            "base": base,
            "model_width": self._width.get(),
            "loras": tuple(
                (path, read_number("LoRA's scale", scale.get(), kind=float))
                for path, scale in self._loras
            ),
            "text_encoders": tuple(names) or None,
        }

    def show(self, choice: ModelChoice, draw: DrawSettings) -> None:
        """Fill all fields."""
        self._model.set(model_label(choice))
        self._width.set(choice.model_width)
        values = vars(draw) | vars(choice)
        for _, field, choices in CHOICES:
            labels = [label for label, value in choices.items() if value == values[field]]
            self.choices[field].set(next(iter([*labels, *choices])))
        self._text_encoders.set(", ".join(choice.text_encoders or ()))
        self._loras = [(path, tk.StringVar(value=f"{w:g}")) for path, w in choice.loras]
        self._show_loras()

    def offer_models(self, names: Sequence[str]) -> None:
        """The names in the list of models, below the default."""
        self._model_field.configure(values=[DEFAULT_MODEL, *names])

    def offer_widths(self, config: Description) -> None:
        """Only the widths that a model has."""
        for name, button in self._widths.items():
            held = parse_width(name).share in config.widths
            button.state(["!disabled" if held else "disabled"])

    # --- fields ---------------------------------------------------------------------------------

    def _width_part(self) -> None:
        heading(self, "Network width")
        row = ttk.Frame(self)
        row.grid(sticky="ew")
        self._widths = {}
        for column, name in enumerate(WIDTH_NAMES):
            row.columnconfigure(column, weight=1, uniform="width")
            button = toggle(row, name, self._width)
            button.grid(row=0, column=column, sticky="ew", padx=(0, 2))
            self._widths[name] = button

    def _model_part(self) -> None:
        row = labeled_row(self, "Model", is_heading=True)
        ttk.Button(row, text="Folder…", command=self._choose_folder).grid(
            row=0, column=1, sticky="e"
        )
        self._model_field = ttk.Combobox(self, textvariable=self._model)
        self._model_field.grid(sticky="ew")
        self._model_field.bind("<<ComboboxSelected>>", lambda _: self._load())
        self._model_field.bind("<Return>", lambda _: self._load())
        ttk.Label(self, text="A folder, or owner/name on Hugging Face", style="Muted.TLabel").grid(
            sticky="w", pady=(3, 0)
        )

    def _choose_folder(self) -> None:
        model, *_ = read_model(self._model.get())
        parent = expanded(model).parent if model is not None else Path()
        folder = filedialog.askdirectory(
            parent=self,
            title="Model folder",
            initialdir=start_folder(str(parent) if parent.is_absolute() else ""),
            mustexist=True,
        )
        if folder:
            self._model.set(folder)
            self._load()

    def _lora_part(self) -> None:
        row = labeled_row(self, "LoRA", is_heading=True)
        ttk.Button(row, text="Add…", command=self._add_lora).grid(row=0, column=1, sticky="e")
        self._lora_frame = ttk.Frame(self)
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
            self._loras.append((path, tk.StringVar(value="1")))
            self._show_loras()

    def _drop_lora(self, pair: tuple[str, tk.StringVar]) -> None:
        self._loras.remove(pair)
        self._show_loras()

    def _mode_part(self) -> None:
        heading(self, "Mode")
        for label, field, choices in CHOICES:
            row = labeled_row(self, label)
            box = ttk.Combobox(
                row,
                textvariable=self.choices[field],
                values=list(choices),
                state="readonly",
                width=10,
            )
            box.grid(row=0, column=1, sticky="e")
        row = labeled_row(self, "Text encoders")
        ttk.Entry(row, textvariable=self._text_encoders, width=12).grid(row=0, column=1, sticky="e")
