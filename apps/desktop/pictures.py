"""The window's actions on pictures, in its history and in files."""

import dataclasses
import time
import tkinter as tk
from pathlib import Path
from tkinter import filedialog, messagebox

from apps.desktop import system
from apps.desktop.history import Entry, open_image
from apps.desktop.settings import start_folder
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.metadata import foreign

BUDGET = 0.015
"""Seconds that thumbnails are loaded without a pause, so that the window stays responsive."""


class Pictures:
    """Shows, opens, saves and deletes pictures for `window`.

    All commands act on the picture that is shown, `window.strip.selected`. That is None while an
    estimate is shown.
    """

    def __init__(self, window):
        self._window = window
        self._old = window.history.load()

    def load_history(self) -> None:
        """Fill the strip with earlier pictures, a few thumbnails at a time."""
        started = time.perf_counter()
        for entry, small in self._old:
            if entry not in self._window.strip.entries:
                self._window.strip.add(entry, small, at_end=True)
            if time.perf_counter() - started > BUDGET:
                self._window.after(5, self.load_history)
                return
        if skipped := self._window.history.skipped:
            names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
            self._window.show_error(f"damaged or too large for the history: {names}")

    def show(self, entry: Entry) -> None:
        """Show a picture. The form does not change, and a running job shows no previews."""
        try:
            image = open_image(entry.path)
        except UserError as error:
            self._window.show_error(str(error))
            return
        self._window.show_picture(image, entry)

    def use_settings(self) -> None:
        """Fill the form with the settings of the shown picture."""
        if (entry := self._window.strip.selected) is not None:
            self._restore_settings(entry.path)

    def open_picture(self, path: Path) -> None:
        """Show a PNG, and its settings in the form."""
        if self._restore_settings(path):
            self.show(Entry(expanded(path)))

    def use_picture(self) -> None:
        """Start from the shown picture."""
        if (path := self._kept_copy()) is not None:
            self._window.form.start_from(path)

    def edit_picture(self) -> None:
        """Add the shown picture to the pictures to edit, for a model that can edit."""
        if self._window.form.start.can_edit and (path := self._kept_copy()) is not None:
            self._window.form.edit_picture(path)

    def _kept_copy(self) -> str | None:
        """The file of the shown picture, as a copy if the history may delete it."""
        entry = self._window.strip.selected
        if entry is None:
            return None
        if entry not in self._window.strip.entries:
            return str(entry.path)
        try:
            return self._window.inputs.keep_file(entry.path, entry.name)
        except UserError as error:
            self._window.show_error(str(error))
            return None

    def paste(self) -> None:
        """Start from the picture on the clipboard."""
        window = self._window
        try:
            # xclip would wait for an answer of this window, which waits for xclip.
            pasted = None if self._owns_clipboard() else system.pasted_picture()
            if pasted is None:
                raise UserError("the clipboard has no picture: copy one first")
            if not isinstance(pasted, Path):
                pasted = Path(window.inputs.keep_picture(pasted, "pasted"))
        except UserError as error:
            window.show_error(str(error))
        else:
            window.form.start_from(str(pasted))

    def _owns_clipboard(self) -> bool:
        """Whether the clipboard has text that was copied in a Tk window, such as this one."""
        if not self._window.theme.x11:
            return False
        try:
            return "TK_APPLICATION" in self._window.clipboard_get(type="TARGETS").split()
        except tk.TclError:
            return False

    def paint_mask(self) -> None:
        """Paint the mask of the picture to start from, in the place of the shown picture."""
        start = self._window.form.start
        if start.picture is None:
            return
        painter = self._window.painter
        if painter.is_open:
            self.stop_painting()
        else:
            painter.open(start.picture, start.redrawn)

    def stop_painting(self) -> None:
        """Use the mask that is being painted, if any."""
        painter = self._window.painter
        changed = painter.changed
        painter.close()
        if changed:
            try:
                self._window.form.start.keep_mask(painter.mask)
            except UserError as error:
                self._window.show_error(str(error))

    def _restore_settings(self, path: Path) -> bool:
        try:
            settings = self._window.form.read(self._window.settings)
        except UserError:
            settings = self._window.settings
        try:
            restored, notice = settings.restored(path, self._window.inputs)
        except UserError as error:
            self._window.show_error(str(error))
            return False
        # The window drew the pictures of its history itself. Others may be a stranger's.
        own = Entry(path) in self._window.strip.entries
        others = "" if own else foreign(restored.choice, settings.choice)
        if others:
            question = (
                f"{path.name} was drawn with {others}.\n\nUse that? It may be downloaded when you "
                "generate. With No, the form keeps its model and LoRAs."
            )
            answer = messagebox.askyesnocancel("Another model", question, parent=self._window)
            if answer is None:
                return False
            restored = restored if answer else restored.with_model_of(settings)
        settings = restored
        self._window.banner.hide()
        self.stop_painting()
        self._window.form.show(settings)
        self._window.remember(settings)
        if notice:
            self._window.show_error(notice)
        return True

    def open(self) -> None:
        """Open the dialog for a PNG, then `open_picture`."""
        path = filedialog.askopenfilename(
            parent=self._window,
            initialdir=start_folder(self._window.settings.folder),
            filetypes=[("PNG", "*.png")],
        )
        if path:
            self._remember_folder(Path(path))
            self.open_picture(Path(path))

    def save(self) -> None:
        """Open the dialog for a path, then save the shown picture."""
        entry = self._window.strip.selected
        if entry is None:
            return
        path = filedialog.asksaveasfilename(
            parent=self._window,
            initialdir=start_folder(self._window.settings.folder),
            initialfile=f"{entry.name}.png",
            defaultextension=".png",
            filetypes=[("PNG", "*.png")],
        )
        if path:
            self.save_to(entry, Path(path))

    def save_to(self, entry: Entry, path: Path) -> None:
        """Save a picture with its settings; an existing file is replaced."""
        try:
            with whole_file(path) as partial:
                partial.write_bytes(entry.path.read_bytes())
        except OSError as error:
            self._window.banner.show(f"Cannot save {path}: {error.strerror or error}")
            return
        self._remember_folder(path)
        self._window.status.set(f"Saved {path.name}")

    def _remember_folder(self, path: Path) -> None:
        settings = dataclasses.replace(self._window.settings, folder=str(path.parent))
        self._window.remember(settings)

    def copy(self) -> None:
        """Put the shown picture on the clipboard."""
        self._with_selected(system.copy_picture, "Copied")

    def reveal(self) -> None:
        """Show the file of the shown picture."""
        self._with_selected(system.reveal, "")

    def _with_selected(self, action, status: str) -> None:
        if self._window.strip.selected is None:
            return
        try:
            action(self._window.strip.selected.path)
        except UserError as error:
            self._window.show_error(str(error))
        else:
            self._window.status.set(status)

    def delete(self) -> None:
        """Delete the shown picture from the history, if the user confirms."""
        entry = self._window.strip.selected
        if entry is None:
            return
        if entry not in self._window.strip.entries:
            self._window.show_error(f"{entry.path.name} is not in the history")
            return
        question = "Delete this picture from the history? Saved copies stay."
        if messagebox.askokcancel("Delete", question, parent=self._window):
            self._window.history.delete(entry)
            self._window.strip.remove(entry)
            self._window.show_picture(None, None)

    def show_menu(self, entry: Entry, x: int, y: int) -> None:
        """Show a picture and open its menu at x, y of the screen."""
        self.show(entry)
        if self._window.strip.selected == entry:
            self._window.picture_menu.tk_popup(x, y)
