"""Widgets that ttk lacks: picture, film strip, scrolling column, slider with a number, banner; and
the rows of a page."""

import tkinter as tk
from collections.abc import Callable
from tkinter import ttk

from PIL import Image, ImageTk

from apps.desktop.history import THUMBNAIL, Entry
from apps.desktop.theme import Theme

MARGIN = 12


def fit(size: tuple[int, int], space: tuple[int, int]) -> tuple[int, int]:
    """`size` scaled to the largest that `space` holds, at least 1x1."""
    scale = min(space[0] / size[0], space[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


class PictureView(tk.Canvas):
    """One picture, as large as the space allows, or a hint without a picture."""

    on_stage = True

    def __init__(self, master: tk.Misc, hint: str, *, theme: Theme):
        super().__init__(master, highlightthickness=0, width=320, height=240)
        self._theme, self._hint = theme, hint
        self.image: Image.Image | None = None
        self._photo: ImageTk.PhotoImage | None = None
        self._late: str | None = None
        self.space = (320, 240)
        """(width, height) that a picture may fill; read by the thread that scales previews."""
        self.bind("<Configure>", self._resized)
        self.bind("<<Painted>>", lambda _: self._draw())

    def show(self, image: Image.Image | None, scaled: Image.Image | None = None) -> None:
        """Show a picture; `scaled` is a copy already resized to `space`."""
        self.image = image
        if image is not None:
            size = fit(image.size, self.space)
            if scaled is None or scaled.size != size:
                scaled = scale(image, self.space)
            self._photo = ImageTk.PhotoImage(scaled, master=self)
        else:
            self._photo = None
        self._draw()

    def _resized(self, event: tk.Event) -> None:
        self.space = max(1, event.width - 2 * MARGIN), max(1, event.height - 2 * MARGIN)
        self._draw()
        if self._late is not None:
            self.after_cancel(self._late)
        self._late = self.after(60, self._rescale)

    def _rescale(self) -> None:
        self._late = None
        self.show(self.image)

    def _draw(self) -> None:
        self.delete("all")
        middle = self.space[0] // 2 + MARGIN, self.space[1] // 2 + MARGIN
        if self._photo is not None:
            self.create_image(*middle, image=self._photo)
        else:
            self.create_text(
                *middle,
                text=self._hint,
                fill=self._theme.palette.muted,
                font=self._theme.large,
                justify="center",
                width=self.space[0],
            )


def scale(image: Image.Image, space: tuple[int, int]) -> Image.Image:
    """`image` resized to fit."""
    size = fit(image.size, space)
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


class Filmstrip(ttk.Frame):
    """Thumbnails in a row, the newest first.

    Args:
        choose: called with the entry that is clicked or reached with the arrow keys.
        use: called at a double click or Return, after `choose`.
        menu: called with (entry, x, y) on the screen at a right click.
    """

    GAP = 8

    def __init__(
        self,
        master: tk.Misc,
        theme: Theme,
        *,
        choose: Callable[[Entry], None],
        use: Callable[[], None],
        menu: Callable[[Entry, int, int], None],
        limit: int,
    ):
        super().__init__(master)
        self._theme, self._choose, self._menu, self._limit = theme, choose, menu, limit
        self.entries: list[Entry] = []
        self.selected: Entry | None = None
        self._photos: list[ImageTk.PhotoImage] = []
        self._cell = THUMBNAIL + self.GAP
        self._canvas = tk.Canvas(
            self, height=self._cell + self.GAP, highlightthickness=0, takefocus=True
        )
        bar = ttk.Scrollbar(self, orient="horizontal", command=self._canvas.xview)
        self._bar = bar
        self._canvas.configure(xscrollcommand=self._scrolled, xscrollincrement=self._cell // 4)
        self._canvas.pack(fill="x", expand=True)
        bar.pack(fill="x")
        self._canvas.bind("<Button-1>", self._clicked)
        self._canvas.bind("<Double-Button-1>", lambda e: self._at(e) is not None and use())
        self._canvas.bind("<Return>", lambda _: use())
        for button in ("<Button-2>", "<Button-3>", "<Control-Button-1>"):
            self._canvas.bind(button, self._open_menu)
        self._canvas.bind("<Left>", lambda _: self.step(-1))
        self._canvas.bind("<Right>", lambda _: self.step(1))
        self._canvas.bind("<MouseWheel>", self._wheel)
        self._canvas.bind("<Shift-MouseWheel>", self._wheel)
        for button, way in (("<Button-4>", -2), ("<Button-5>", 2)):
            self._canvas.bind(button, lambda _, way=way: self._canvas.xview_scroll(way, "units"))
        self._canvas.bind("<<Painted>>", lambda _: self._mark())

    def add(self, entry: Entry, thumbnail: Image.Image, *, at_end: bool = False) -> None:
        """Put an entry first, or last while older ones are being loaded."""
        photo = ImageTk.PhotoImage(thumbnail, master=self)
        if at_end:
            index = len(self.entries)
        else:
            index = 0
            self._canvas.move("picture", self._cell, 0)
        self.entries.insert(index, entry)
        self._photos.insert(index, photo)
        x, y = self._middle(index)
        self._canvas.create_image(x, y, image=photo, tags="picture")
        if len(self.entries) > self._limit:
            self._remove(len(self.entries) - 1)
        self._mark()

    def remove(self, entry: Entry) -> None:
        """Remove an entry."""
        if entry in self.entries:
            self._remove(self.entries.index(entry))
            self._mark()

    def select(self, entry: Entry | None) -> None:
        """Frame an entry without calling `choose`; one that is not here frames none."""
        self.selected = entry
        self._mark()

    def step(self, by: int) -> None:
        """Choose the neighbor of the selected entry."""
        if self.entries:
            index = self.entries.index(self.selected) + by if self.selected in self.entries else 0
            if 0 <= index < len(self.entries):
                self._pick(index)

    def _scrolled(self, first: float | str, last: float | str) -> None:
        self._bar.set(float(first), float(last))
        self._bar.state(["disabled" if float(first) <= 0 and float(last) >= 1 else "!disabled"])

    def _remove(self, index: int) -> None:
        x, _ = self._middle(index)
        photo = self._photos[index]
        for item in self._canvas.find_withtag("picture"):
            if self._canvas.itemcget(item, "image") == str(photo):
                self._canvas.delete(item)
            elif self._canvas.coords(item)[0] > x:
                self._canvas.move(item, -self._cell, 0)
        del self.entries[index], self._photos[index]

    def _middle(self, index: int) -> tuple[float, float]:
        return index * self._cell + self.GAP + THUMBNAIL / 2, self.GAP + THUMBNAIL / 2

    def _at(self, event: tk.Event) -> int | None:
        index = int((self._canvas.canvasx(event.x) - self.GAP / 2) // self._cell)
        return index if 0 <= index < len(self.entries) else None

    def _pick(self, index: int) -> None:
        x, _ = self._middle(index)
        left, right = self._canvas.canvasx(0), self._canvas.canvasx(self._canvas.winfo_width())
        if not left < x < right:
            self._canvas.xview_moveto((x - self._cell) / max(1, len(self.entries) * self._cell))
        self._choose(self.entries[index])

    def _clicked(self, event: tk.Event) -> None:
        self._canvas.focus_set()
        if (index := self._at(event)) is not None:
            self._pick(index)

    def _open_menu(self, event: tk.Event) -> str:
        if (index := self._at(event)) is not None:
            self._menu(self.entries[index], event.x_root, event.y_root)
        return "break"

    def _wheel(self, event: tk.Event) -> None:
        self._canvas.xview_scroll(-1 if event.delta > 0 else 1, "units")

    def _mark(self) -> None:
        self._canvas.configure(scrollregion=(0, 0, len(self.entries) * self._cell + self.GAP, 0))
        self._canvas.delete("mark")
        if not self.entries:
            self._canvas.create_text(
                self.GAP,
                self._cell / 2,
                anchor="w",
                tags="mark",
                text="Your pictures appear here.",
                fill=self._theme.palette.muted,
            )
        elif self.selected in self.entries:
            x, y = self._middle(self.entries.index(self.selected))
            half = THUMBNAIL / 2 + 2
            self._canvas.create_rectangle(
                x - half,
                y - half,
                x + half,
                y + half,
                width=3,
                outline=self._theme.palette.accent,
                tags="mark",
            )


class Column(ttk.Frame):
    """A column that scrolls when it is taller than the window; its widgets go into `inside`."""

    def __init__(self, master: tk.Misc, width: int):
        super().__init__(master)
        self._canvas = tk.Canvas(self, width=width, highlightthickness=0, yscrollincrement=12)
        self._bar = ttk.Scrollbar(self, command=self._canvas.yview)
        self._canvas.configure(yscrollcommand=self._scrolled)
        self._canvas.pack(side="left", fill="both", expand=True)
        self.inside = ttk.Frame(self._canvas)
        item = self._canvas.create_window(0, 0, anchor="nw", window=self.inside)
        self.inside.bind("<Configure>", self._measure)
        self._canvas.bind("<Configure>", lambda e: self._canvas.itemconfigure(item, width=e.width))

    def bind_wheel(self) -> None:
        """Scroll wherever the pointer is; call after all widgets are created."""

        def over(widget: tk.Misc) -> None:
            if widget.winfo_class() not in ("Text", "TCombobox", "TSpinbox"):
                widget.bind("<MouseWheel>", lambda e: self._wheel(-1 if e.delta > 0 else 1))
                widget.bind("<Button-4>", lambda _: self._wheel(-1))
                widget.bind("<Button-5>", lambda _: self._wheel(1))
            for child in widget.winfo_children():
                over(child)

        over(self)

    def _wheel(self, way: int) -> None:
        if self._canvas.yview() != (0.0, 1.0):
            self._canvas.yview_scroll(3 * way, "units")

    def _measure(self, _event: tk.Event) -> None:
        self._canvas.configure(scrollregion=self._canvas.bbox("all"))

    def _scrolled(self, first: float | str, last: float | str) -> None:
        self._bar.set(float(first), float(last))
        if float(first) <= 0 and float(last) >= 1:
            self._bar.place_forget()
        else:
            # Over the margin: packed, it would change the width of all pages.
            self._bar.place(relx=1, rely=0, relheight=1, anchor="ne")


class Slider(ttk.Frame):
    """A label, a number that can be typed, and a slider for its usual range.

    The number is a text variable, so that it may be empty or out of the slider's range.
    """

    def __init__(
        self,
        master: tk.Misc,
        label: str,
        *,
        variable: tk.StringVar,
        low: float,
        high: float,
        by: float,
    ):
        super().__init__(master)
        self._variable, self._by = variable, by
        self.columnconfigure(0, weight=1)
        ttk.Label(self, text=label).grid(row=0, column=0, sticky="w")
        self.entry = ttk.Spinbox(
            self, textvariable=variable, from_=low, to=high, increment=by, width=6
        )
        self.entry.grid(row=0, column=1, sticky="e")
        self._scale = ttk.Scale(self, from_=low, to=high, command=self._moved)
        self._scale.grid(row=1, column=0, columnspan=2, sticky="ew", pady=(4, 0))
        variable.trace_add("write", self._typed)

    def enable(self, is_enabled: bool) -> None:
        """Whether the number can be changed."""
        state = ["!disabled" if is_enabled else "disabled"]
        self.entry.state(state)
        self._scale.state(state)

    def _moved(self, value: str) -> None:
        number = round(float(value) / self._by) * self._by
        self._variable.set(f"{number:g}")

    def _typed(self, *_: str) -> None:
        try:
            number = float(self._variable.get())
        except ValueError:
            return
        # Setting the scale's value while it moves would call back endlessly.
        if abs(float(self._scale.get()) - number) > self._by / 2:
            self._scale.configure(value=number)


class Banner(ttk.Frame):
    """One message, with a button for its details; hidden without a message."""

    def __init__(self, master: tk.Misc, details: Callable[[str, str | None], object]):
        super().__init__(master, style="Banner.TFrame", padding=(12, 6))
        self._show_details = details
        self.message = ""
        self.details: str | None = None
        self._label = ttk.Label(self, style="Banner.TLabel", justify="left")
        self._close = ttk.Button(self, text="Dismiss", command=self.hide)
        self._more = ttk.Button(self, text="Details…", command=self._open)
        self._close.pack(side="right")
        self._label.pack(side="left", fill="x", expand=True)
        self.bind("<Configure>", lambda e: self._wrap(e.width))

    def show(self, message: str, details: str | None = None) -> None:
        """Show a message; a button opens the `details`."""
        self.message, self.details = message, details
        self._label.configure(text=message)
        self._more.pack_forget()
        if details is not None:
            self._more.pack(side="right", padx=(0, 8), before=self._label)
        self.grid()
        self._wrap(self.winfo_width())

    def _wrap(self, width: int) -> None:
        shown = [self._close] if self.details is None else [self._close, self._more]
        taken = sum(button.winfo_reqwidth() + 8 for button in shown)
        self._label.configure(wraplength=max(120, width - taken - 40))

    def hide(self) -> None:
        self.message, self.details = "", None
        self.grid_remove()

    def _open(self) -> None:
        self._show_details(self.message, self.details)


def heading(master: tk.Misc, text: str) -> None:
    """A heading in the next row of a page."""
    ttk.Label(master, text=text, style="Heading.TLabel").grid(sticky="w", pady=(10, 4))


def labeled_row(master: tk.Misc, label: str, is_heading: bool = False) -> ttk.Frame:
    """The next row of a page, with a label in its column 0."""
    row = ttk.Frame(master)
    row.grid(sticky="ew", pady=(10, 4) if is_heading else 2)
    row.columnconfigure(0, weight=1)
    style = "Heading.TLabel" if is_heading else "TLabel"
    ttk.Label(row, text=label, style=style).grid(row=0, column=0, sticky="w")
    return row


def toggle(row: tk.Misc, name: str, variable: tk.Variable) -> ttk.Radiobutton:
    """A button of a row of which one is pressed; `variable` gets its `name`."""
    return ttk.Radiobutton(
        row, text=name.capitalize(), value=name, variable=variable, style="Toolbutton"
    )
