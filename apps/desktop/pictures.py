"""The window's actions on pictures, in its history and in files."""

import dataclasses
import time
from pathlib import Path
from tkinter import filedialog, messagebox

from PIL import Image

from apps.desktop import system
from apps.desktop.history import Entry
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import whole_file

BUDGET = 0.015
"""Seconds that thumbnails are loaded without a pause, so that the window stays responsive."""


class Pictures:
    """Shows, opens, saves and deletes pictures for `window`."""

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

    def restore(self, entry: Entry) -> None:
        """Show a picture of the history, and its settings in the form."""
        if self._window.run is None or not self._window.run.draws:
            self.open_picture(entry.path)
        else:
            self._restore_settings(entry.path)
        self._window.update_buttons()

    def open_picture(self, path: Path) -> None:
        """Show a PNG, and its settings in the form."""
        if self._restore_settings(path):
            with Image.open(path) as image:
                self._window.view.show(image.convert("RGB"))

    def _restore_settings(self, path: Path) -> bool:
        try:
            settings = self._window.form.read(self._window.settings)
        except UserError:
            settings = self._window.settings
        try:
            settings = settings.restored(path)
        except UserError as error:
            self._window.show_error(str(error))
            return False
        self._window.banner.hide()
        self._window.form.show(settings)
        self._window.remember(settings)
        return True

    def open(self) -> None:
        """Open the dialog for a PNG, then `open_picture`."""
        path = filedialog.askopenfilename(parent=self._window, filetypes=[("PNG", "*.png")])
        if path:
            self.open_picture(Path(path))

    def save(self) -> None:
        """Open the dialog for a path, then save the selected picture."""
        entry = self._window.strip.selected
        if entry is None:
            return
        path = filedialog.asksaveasfilename(
            parent=self._window,
            initialdir=self._window.settings.folder or None,
            initialfile=f"{entry.name}.png",
            defaultextension=".png",
            filetypes=[("PNG", "*.png")],
        )
        if path:
            self.save_to(entry, Path(path))

    def save_to(self, entry: Entry, path: Path) -> None:
        """Save a picture of the history with its settings; an existing file is replaced."""
        try:
            with whole_file(path) as partial:
                partial.write_bytes(entry.path.read_bytes())
        except OSError as error:
            self._window.banner.show(f"Cannot save {path}: {error.strerror or error}")
            return
        self._window.settings = dataclasses.replace(self._window.settings, folder=str(path.parent))
        self._window.status.set(f"Saved {path.name}")

    def copy(self) -> None:
        """Put the selected picture on the clipboard."""
        self._with_selected(system.copy_picture, "Copied")

    def reveal(self) -> None:
        """Show the selected picture's file."""
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
        """Delete the selected picture from the history, if the user confirms."""
        entry = self._window.strip.selected
        question = "Delete this picture from the history? Saved copies stay."
        if entry is not None and messagebox.askokcancel("Delete", question, parent=self._window):
            self._window.history.delete(entry)
            self._window.strip.remove(entry)
            self._window.strip.select(None)
            self._window.view.show(None)
            self._window.update_buttons()

    def show_menu(self, entry: Entry, x: int, y: int) -> None:
        """Select a picture and open its menu at x, y of the screen."""
        self._window.strip.select(entry)
        self._window.update_buttons()
        self._window.picture_menu.tk_popup(x, y)
