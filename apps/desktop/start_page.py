"""The form's page for pictures to start from, their masks, and pictures to edit."""

import contextlib
import functools
import os
import tkinter as tk
from collections.abc import Callable
from pathlib import Path
from tkinter import filedialog, ttk
from typing import Any

from PIL import Image, ImageTk

from apps.desktop.fields import read_number
from apps.desktop.inputs import Inputs
from apps.desktop.painter import StageCanvas, with_mask
from apps.desktop.settings import start_folder
from apps.desktop.theme import Theme
from apps.desktop.widgets import Slider, heading, scale, toggle
from apps.desktop.wording import shortened
from mlx_snapgen.errors import UserError
from mlx_snapgen.fitting import FITS, check_reference, fitted_mask
from mlx_snapgen.picture_files import picture_size, read_picture
from mlx_snapgen.settings import MASKED_STRENGTH, STRENGTH, DrawSettings

MAX_SIDE = 2048
"""Pixels of the copy that is shown and painted on."""
WELL, SMALL_WELL = 150, 100
"""Height of the well in pixels, without and with pictures to edit below."""
SMALL = 36
"""Pixels of the side of a picture to edit in its list."""
PICTURES = (
    ("Pictures", "*.png *.jpg *.jpeg *.webp *.heic *.bmp *.gif *.tif *.tiff"),
    ("All files", "*"),
)


class StartPage(ttk.Frame):
    """Shows and reads the pictures of `DrawSettings`.

    Generates <<Changed>> at another picture or mask.

    Args:
        inputs: where masks are stored.
        paint: called to paint the mask.
        paste: called to take the clipboard's picture.
        tell: called with the text of an error.
        changed: called when the user chose another picture, or none.
    """

    def __init__(
        self,
        master: tk.Misc,
        theme: Theme,
        *,
        inputs: Inputs,
        paint: Callable[[], None],
        paste: Callable[[], None],
        tell: Callable[[str], None],
        changed: Callable[[], None],
    ):
        super().__init__(master)
        self._theme, self._inputs, self._tell, self._changed = theme, inputs, tell, changed
        self._paint = paint
        self.image: str | None = None
        self.picture: Image.Image | None = None
        """RGB, at most `MAX_SIDE` pixels a side; None if the file cannot be read."""
        self.size = (1, 1)
        """(width, height) of the file's picture."""
        self.mask: str | None = None
        self.redrawn: Image.Image | None = None
        """The mask, mode L, 255 where to redraw; None if the file cannot be read."""
        self.edit: list[str] = []
        self.can_edit = self.accepts_drops = False
        self.strength, self.fit = tk.StringVar(), tk.StringVar(value=FITS[0])
        self._folder = ""
        self._photo: ImageTk.PhotoImage | None = None
        self._small: list[ImageTk.PhotoImage] = []
        self.columnconfigure(0, weight=1)
        self._picture_part(paste)
        self._mask_part()
        self._edit_part()
        self._update()

    # --- reading and showing --------------------------------------------------------------------

    def read(self) -> dict[str, Any]:
        """The fields of `DrawSettings`; `UserError` for a strength that is no number."""
        strength = "" if self.image is None else self.strength.get()
        return {
            "image": self.image,
            "mask": self.mask,
            "strength": read_number("strength", strength, kind=float, optional=True),
            "fit": self.fit.get(),
            "edit": tuple(self.edit),
        }

    def show(self, draw: DrawSettings, folder: str) -> None:
        """Show settings. Files that cannot be read stay chosen, and the page says so.

        Args:
            folder: where dialogs start.
        """
        self._folder = folder
        self.image = self.picture = self.mask = self.redrawn = None
        if draw.image is not None:
            self.image = str(draw.image)
            try:
                self.picture, self.size = _shown(self.image)
            except UserError:
                self.picture = None
            if draw.mask is not None:
                self.mask = str(draw.mask)
                try:
                    self.redrawn = self._read_mask(self.mask)
                except UserError:
                    self.redrawn = None
        strength = self._default if draw.strength is None else draw.strength
        self.strength.set(f"{strength:g}")
        self.fit.set(draw.fit if draw.fit in FITS else FITS[0])
        self.edit = [str(path) for path in draw.edit]
        self._show_edit()
        self._update()

    def set_picture(self, path: str) -> bool:
        """Start from a picture; the mask of another one is removed. Whether it can be read."""
        try:
            picture, size = _shown(path)
        except UserError as error:
            self._tell(str(error))
            return False
        self.image, self.picture, self.size = path, picture, size
        self.set_mask(None)
        self._changed()
        return True

    def remove(self) -> None:
        """Start from no picture."""
        self.image = self.picture = None
        self.set_mask(None)
        self._changed()

    def set_mask(self, path: str | None) -> None:
        """Redraw only parts of the picture, or all of it."""
        redrawn = None
        if path is not None:
            try:
                redrawn = self._read_mask(path)
            except UserError as error:
                self._tell(str(error))
                return
        self._use_mask(path, redrawn)

    def _use_mask(self, path: str | None, redrawn: Image.Image | None) -> None:
        before = f"{self._default:g}"
        self.mask, self.redrawn = path, redrawn
        # A strength that the user chose stays.
        if self.strength.get().strip() in ("", before):
            self.strength.set(f"{self._default:g}")
        self._update()

    def keep_mask(self, redrawn: Image.Image) -> None:
        """Store a painted mask (L, 255 where to redraw) and use it; an empty one is no mask."""
        if redrawn.getbbox() is None:
            self.set_mask(None)
        else:
            self._use_mask(self._inputs.keep_mask(redrawn, self.size), redrawn)

    def add_edit(self, path: str) -> bool:
        """Add a picture to edit. Whether it can be used."""
        try:
            check_reference(*picture_size(path))
        except UserError as error:
            self._tell(str(error))
            return False
        if path not in self.edit:
            self.edit.append(path)
            self._show_edit()
            self._changed()
        return True

    def offer_edit(self, can_edit: bool) -> None:
        """Show the pictures to edit only for a model that can edit."""
        self.can_edit = can_edit
        self.well.configure(height=SMALL_WELL if can_edit else WELL)
        if can_edit:
            self._edit_frame.grid()
        else:
            self._edit_frame.grid_remove()

    @property
    def first_size(self) -> tuple[int, int] | None:
        """(height, width) of the picture that gives a drawing its aspect ratio, if any."""
        if self.picture is not None:
            return self.size[1], self.size[0]
        if self.image is None and self.can_edit and self.edit:
            with contextlib.suppress(UserError):
                return picture_size(self.edit[0])
        return None

    @property
    def paths(self) -> list[str]:
        """All files in use."""
        return [path for path in (self.image, self.mask, *self.edit) if path is not None]

    @property
    def _default(self) -> float:
        return STRENGTH if self.mask is None else MASKED_STRENGTH

    def _read_mask(self, path: str) -> Image.Image:
        height, width = picture_size(path)
        if self.picture is not None and (width, height) != self.size:
            raise UserError(
                f"the mask has {width}x{height} pixels and the picture "
                f"{self.size[0]}x{self.size[1]}: both must have the same size"
            )
        return Image.fromarray(fitted_mask(path, (height, width), how=FITS[0])).convert("L")

    # --- the picture ----------------------------------------------------------------------------

    def _picture_part(self, paste: Callable[[], None]) -> None:
        heading(self, "Picture to start from")
        self.well = StageCanvas(self, height=WELL, width=200, highlightthickness=0, cursor="hand2")
        self.well.grid(sticky="ew")
        self.well.bind("<Configure>", lambda _: self._draw())
        self.well.bind("<<Painted>>", lambda _: self._draw())
        self.well.bind("<Button-1>", lambda _: self._click())
        self._name = ttk.Label(self, style="Muted.TLabel")
        self._name.grid(sticky="ew", pady=(3, 4))
        row = ttk.Frame(self)
        row.grid(sticky="ew")
        row.columnconfigure(2, weight=1)
        ttk.Button(row, text="Open…", command=self.choose).grid(row=0, column=0)
        ttk.Button(row, text="Paste", command=paste).grid(row=0, column=1, padx=6)
        self.remove_button = ttk.Button(row, text="Remove", command=self.remove)
        self.remove_button.grid(row=0, column=2, sticky="e")
        self.slider = Slider(self, "Strength", variable=self.strength, low=0.05, high=1, by=0.05)
        self.slider.grid(sticky="ew", pady=(10, 0))
        ends = ttk.Frame(self)
        ends.grid(sticky="ew")
        ends.columnconfigure(0, weight=1)
        for column, text in enumerate(("like the picture", "all new")):
            ttk.Label(ends, text=text, style="Muted.TLabel").grid(row=0, column=column, sticky="w")
        row = ttk.Frame(self)
        row.grid(sticky="ew", pady=(8, 0))
        row.columnconfigure(0, weight=1)
        ttk.Label(row, text="Fit").grid(row=0, column=0, sticky="w")
        self._fits = []
        for column, name in enumerate(FITS, start=1):
            button = toggle(row, name, self.fit)
            button.grid(row=0, column=column, padx=(2, 0))
            self._fits.append(button)

    def choose(self) -> None:
        """Open the dialog for a picture to start from."""
        if path := self._ask("Picture to start from"):
            self.set_picture(path)

    def _ask(self, title: str) -> str:
        path = filedialog.askopenfilename(
            parent=self, title=title, initialdir=start_folder(self._folder), filetypes=PICTURES
        )
        if path:
            self._folder = str(Path(path).parent)
        return path or ""

    def _click(self) -> None:
        if self.picture is None:
            self.choose()
        else:
            self._paint()

    def _draw(self) -> None:
        """Show the picture with its mask in the well, or a hint."""
        well, p = self.well, self._theme.palette
        width, height = well.winfo_width(), well.winfo_height()
        well.delete("all")
        self._photo = None
        if self.picture is None:
            well.create_rectangle(
                *(6, 6, width - 7, height - 7), outline=p.border, dash=(5, 4), width=2
            )
            verbs = "Drop, open or paste" if self.accepts_drops else "Open or paste"
            hint = f"{verbs} a picture,\nor use one of the history."
            if self.image is not None:
                hint = f"Not found:\n{Path(self.image).name}"
            well.create_text(
                *(width // 2, height // 2),
                text=hint,
                fill=p.muted,
                justify="center",
                width=width - 30,
            )
            return
        small = scale(self.picture, (max(1, width - 8), max(1, height - 8)))
        if self.redrawn is not None:
            small = with_mask(small, self.redrawn)
        self._photo = ImageTk.PhotoImage(small, master=self)
        well.create_image(width // 2, height // 2, image=self._photo)

    def _update(self) -> None:
        """Enable what can be done with the picture, and show it."""
        name = ""
        if self.image is not None:
            name = shortened(Path(self.image).name, 24)
            if self.picture is not None:
                name += f" · {self.size[0]} × {self.size[1]}"  # noqa: RUF001
        self._name.configure(text=name)
        has = self.image is not None
        self.slider.enable(has)
        on = ["!disabled" if has else "disabled"]
        for button in (self.remove_button, *self._fits):
            button.state(on)
        readable = ["!disabled" if self.picture is not None else "disabled"]
        for button in (self.paint_button, self.open_mask_button):
            button.state(readable)
        self.remove_mask_button.state(["disabled" if self.mask is None else "!disabled"])
        text = "all of it" if has else ""
        if self.mask is not None:
            text = f"not found: {shortened(Path(self.mask).name, 18)}"
            if self.redrawn is not None:
                share = self.redrawn.resize((64, 64), Image.Resampling.BOX).histogram()
                percent = sum(level * n for level, n in enumerate(share)) / (255 * 64 * 64)
                text = f"{max(0.01, percent):.0%} of it"
        self._share.configure(text=text)
        self._draw()
        self.event_generate("<<Changed>>")

    # --- the mask -------------------------------------------------------------------------------

    def _mask_part(self) -> None:
        row = ttk.Frame(self)
        row.grid(sticky="ew", pady=(12, 4))
        row.columnconfigure(0, weight=1)
        ttk.Label(row, text="Redraw", style="Heading.TLabel").grid(row=0, column=0, sticky="w")
        self._share = ttk.Label(row, style="Muted.TLabel")
        self._share.grid(row=0, column=1, sticky="e")
        row = ttk.Frame(self)
        row.grid(sticky="ew")
        row.columnconfigure(2, weight=1)
        self.paint_button = ttk.Button(row, text="Paint…", command=self._paint)
        self.paint_button.grid(row=0, column=0)
        self.open_mask_button = ttk.Button(row, text="Mask…", command=self.choose_mask)
        self.open_mask_button.grid(row=0, column=1, padx=6)
        self.remove_mask_button = ttk.Button(
            row, text="Remove", command=lambda: self.set_mask(None)
        )
        self.remove_mask_button.grid(row=0, column=2, sticky="e")

    def choose_mask(self) -> None:
        """Open the dialog for a mask."""
        if path := self._ask("Mask: its transparent or white parts are redrawn"):
            self.set_mask(path)

    # --- pictures to edit -----------------------------------------------------------------------

    def _edit_part(self) -> None:
        self._edit_frame = ttk.Frame(self)
        self._edit_frame.grid(sticky="ew", pady=(12, 0))
        self._edit_frame.columnconfigure(0, weight=1)
        self._edit_frame.grid_remove()
        ttk.Label(self._edit_frame, text="Pictures to edit", style="Heading.TLabel").grid(
            row=0, column=0, sticky="w"
        )
        ttk.Button(self._edit_frame, text="Add…", command=self._choose_edit).grid(
            row=0, column=1, sticky="e"
        )
        self._list = ttk.Frame(self._edit_frame)
        self._list.grid(row=1, column=0, columnspan=2, sticky="ew", pady=(4, 0))
        self._list.columnconfigure(1, weight=1)

    def _choose_edit(self) -> None:
        if path := self._ask("Picture to edit"):
            self.add_edit(path)

    def _drop_edit(self, path: str) -> None:
        self.edit.remove(path)
        self._show_edit()
        self._changed()

    def _show_edit(self) -> None:
        for child in self._list.winfo_children():
            child.destroy()
        self._small = []
        for i, path in enumerate(self.edit):
            name = shortened(Path(path).name, 20)
            try:
                small = scale(_shown(path)[0], (SMALL, SMALL))
            except UserError:
                name = f"not found: {shortened(Path(path).name, 14)}"
            else:
                self._small.append(ImageTk.PhotoImage(small, master=self))
                ttk.Label(self._list, image=self._small[-1]).grid(row=i, column=0, pady=2)
            ttk.Label(self._list, text=name).grid(row=i, column=1, sticky="w", padx=8)
            ttk.Button(
                self._list, text="Remove", command=lambda path=path: self._drop_edit(path)
            ).grid(row=i, column=2)
        if not self.edit:
            # An empty frame would keep its former height.
            self._list.configure(height=1)


def _shown(path: str) -> tuple[Image.Image, tuple[int, int]]:
    """A picture to show, at most `MAX_SIDE` pixels a side, and the file's own (width, height)."""
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError:
        changed = 0
    return _read_once(path, changed)


@functools.lru_cache(maxsize=6)
def _read_once(path: str, _changed: int) -> tuple[Image.Image, tuple[int, int]]:
    picture, _ = read_picture(path)
    size = picture.size
    if max(size) > MAX_SIDE:
        picture = scale(picture, (MAX_SIDE, MAX_SIDE))
    return picture, size
