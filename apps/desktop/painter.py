"""Painting a mask: the parts of a picture to redraw."""

import tkinter as tk
from collections.abc import Callable
from tkinter import ttk

from PIL import Image, ImageChops, ImageDraw, ImageTk

from apps.desktop.theme import Theme
from apps.desktop.widgets import MARGIN, fit, scale

COLOR = "#ff2d6f"
"""Of the mask; half transparent."""
HALF = [level // 2 for level in range(256)]
MAX_SIDE = 1024
"""Pixels of the mask's longer side while it is painted."""
MAX_UNDO = 30
SMALLEST, LARGEST = 4, 160
"""Brush diameters in pixels of the screen."""


def with_mask(image: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` (RGB) with a mask (L, 255 where to redraw) of any size over it, half transparent."""
    half = mask.resize(image.size, Image.Resampling.BILINEAR).point(HALF)
    return Image.composite(Image.new("RGB", image.size, COLOR), image, half)


class MaskPainter(ttk.Frame):
    """A picture to paint on with a brush, and its tools.

    Args:
        done: called by the button Done, and by Escape.
    """

    def __init__(self, master: tk.Misc, theme: Theme, *, done: Callable[[], None]):
        super().__init__(master)
        self._theme = theme
        self.changed = False
        """Whether the mask was painted on since `open`."""
        self.picture = Image.new("RGB", (1, 1))
        self.mask = Image.new("L", (1, 1))
        """Mode L, 255 where to redraw; at most `MAX_SIDE` pixels a side."""
        self._undo: list[Image.Image] = []
        self._last: tuple[float, float] | None = None
        self._base: Image.Image | None = None
        self._photo: ImageTk.PhotoImage | None = None
        self._late: str | None = None
        self.tool, self.brush = tk.StringVar(value="brush"), tk.DoubleVar(value=40)
        self.columnconfigure(0, weight=1)
        self.rowconfigure(1, weight=1)
        self._tools(done)
        self._canvas = canvas = StageCanvas(
            self, highlightthickness=0, width=240, height=180, cursor="crosshair"
        )
        canvas.grid(row=1, column=0, sticky="nsew")
        canvas.bind("<Configure>", lambda _: self._draw(rescale=True))
        canvas.bind("<<Painted>>", lambda _: self._draw())
        for button in ("1", "2", "3"):
            erase = button != "1"
            canvas.bind(f"<Button-{button}>", lambda e, erase=erase: self._press(e, erase))
            canvas.bind(f"<B{button}-Motion>", lambda e, erase=erase: self._stroke(e, erase))
            canvas.bind(f"<ButtonRelease-{button}>", lambda _: self._release())
        canvas.bind("<Motion>", self._ring)
        canvas.bind("<Leave>", lambda _: canvas.delete("ring"))
        for key, by in (("<bracketleft>", -6), ("<bracketright>", 6)):
            canvas.bind(key, lambda _, by=by: self._resize(by))
        for button, by in (("<Button-4>", 4), ("<Button-5>", -4)):
            canvas.bind(button, lambda _, by=by: self._resize(by))
        canvas.bind("<MouseWheel>", lambda e: self._resize(4 if e.delta > 0 else -4))
        canvas.bind("<<Undo>>", lambda _: self.undo())
        for key in ("<Delete>", "<BackSpace>"):
            canvas.bind(key, lambda _: (self.clear(), "break")[1])
        canvas.bind("<Escape>", lambda _: (done(), "break")[1])

    def _tools(self, done: Callable[[], None]) -> None:
        bar = ttk.Frame(self, padding=(12, 10, 12, 8))
        bar.grid(row=0, column=0, sticky="ew")
        bar.columnconfigure(3, weight=1)
        for column, (text, value) in enumerate((("Brush", "brush"), ("Eraser", "eraser"))):
            ttk.Radiobutton(
                bar, text=text, value=value, variable=self.tool, style="Toolbutton"
            ).grid(row=0, column=column, padx=(0, 2))
        ttk.Label(bar, text="Size").grid(row=0, column=2, padx=(10, 8))
        ttk.Scale(bar, from_=SMALLEST, to=LARGEST, variable=self.brush, length=80).grid(
            row=0, column=3, sticky="ew"
        )
        row = ttk.Frame(bar)
        row.grid(row=1, column=0, columnspan=4, sticky="ew", pady=(8, 0))
        row.columnconfigure(3, weight=1)
        for column, (text, command) in enumerate(
            (("Undo", self.undo), ("Clear", self.clear), ("Invert", self.invert))
        ):
            ttk.Button(row, text=text, command=command).grid(row=0, column=column, padx=(0, 6))
        ttk.Button(row, text="Done", style="Small.Accent.TButton", command=done).grid(
            row=0, column=4
        )

    def open(self, picture: Image.Image, mask: Image.Image | None) -> None:
        """Start to paint on a picture (RGB) with this mask (L, of any size) on it, or none."""
        size = fit(picture.size, (min(MAX_SIDE, picture.width), min(MAX_SIDE, picture.height)))
        self.picture, self.changed, self._undo = picture, False, []
        if mask is None:
            self.mask = Image.new("L", size)
        else:
            self.mask = mask.resize(size, Image.Resampling.NEAREST)
        self.tool.set("brush")
        self.grid()
        self._draw(rescale=True)
        self._canvas.focus_set()

    def close(self) -> None:
        """Hide the picture and forget the changes."""
        self.changed = False
        self.grid_remove()

    @property
    def is_open(self) -> bool:
        return self.winfo_manager() != ""

    def undo(self) -> None:
        """Take the last change back."""
        if self._undo:
            self.mask = self._undo.pop()
            self._after_change()

    def clear(self) -> None:
        """Select nothing."""
        self._remember()
        self.mask = Image.new("L", self.mask.size)
        self._after_change()

    def invert(self) -> None:
        """Select the other pixels."""
        self._remember()
        self.mask = ImageChops.invert(self.mask)
        self._after_change()

    # --- strokes --------------------------------------------------------------------------------

    def _remember(self) -> None:
        self._undo = [*self._undo[1 - MAX_UNDO :], self.mask.copy()]

    def _after_change(self) -> None:
        self.changed = True
        self._draw()

    def _press(self, event: tk.Event, erase: bool) -> None:
        self._canvas.focus_set()
        self._remember()
        self._last = None
        self._stroke(event, erase)

    def _stroke(self, event: tk.Event, erase: bool) -> None:
        """Paint a line from the last point to this one, with round ends."""
        if self._base is None:
            return
        ratio = self.mask.width / self._base.width
        left, top = self._corner()
        x, y = (event.x - left) * ratio, (event.y - top) * ratio
        radius = max(0.5, self.brush.get() * ratio / 2)
        level = 0 if erase or self.tool.get() == "eraser" else 255
        draw = ImageDraw.Draw(self.mask)
        if self._last is not None:
            draw.line([self._last, (x, y)], fill=level, width=max(1, round(2 * radius)))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=level)
        self._last = x, y
        self.changed = True
        if self._late is None:
            self._late = self.after_idle(self._draw)
        self._ring(event)

    def _release(self) -> None:
        self._last = None

    def _resize(self, by: float) -> None:
        self.brush.set(min(LARGEST, max(SMALLEST, self.brush.get() + by)))
        x, y = (
            self._canvas.winfo_pointerx() - self._canvas.winfo_rootx(),
            self._canvas.winfo_pointery() - self._canvas.winfo_rooty(),
        )
        self._ring_at(x, y)

    def _ring(self, event: tk.Event) -> None:
        self._ring_at(event.x, event.y)

    def _ring_at(self, x: float, y: float) -> None:
        """The outline of the brush, visible on light and on dark."""
        self._canvas.delete("ring")
        half = self.brush.get() / 2
        for grown, color in ((1, "#000000"), (0, "#ffffff")):
            r = half + grown
            self._canvas.create_oval(x - r, y - r, x + r, y + r, outline=color, tags="ring")

    # --- showing --------------------------------------------------------------------------------

    def _corner(self) -> tuple[int, int]:
        assert self._base is not None
        canvas = self._canvas
        return (
            (canvas.winfo_width() - self._base.width) // 2,
            (canvas.winfo_height() - self._base.height) // 2,
        )

    def _draw(self, rescale: bool = False) -> None:
        self._late = None
        if rescale or self._base is None:
            space = [
                max(1, side - 2 * MARGIN)
                for side in (self._canvas.winfo_width(), self._canvas.winfo_height())
            ]
            self._base = scale(self.picture, (space[0], space[1]))
            self._photo = None
        shown = with_mask(self._base, self.mask)
        if self._photo is None:
            self._photo = ImageTk.PhotoImage(shown, master=self)
            self._canvas.delete("picture")
            left, top = self._corner()
            self._canvas.create_image(left, top, image=self._photo, anchor="nw", tags="picture")
            self._canvas.tag_lower("picture")
        else:
            self._photo.paste(shown)


class StageCanvas(tk.Canvas):
    """A canvas in the color behind pictures."""

    on_stage = True
