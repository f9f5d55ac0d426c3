"""The window's actions on pictures, in its history and in files."""

import dataclasses
import time
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

    def _restore_settings(self, path: Path) -> bool:
        try:
            settings = self._window.form.read(self._window.settings)
        except UserError:
            settings = self._window.settings
        try:
            restored = settings.restored(path)
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
        self._window.form.show(settings)
        self._window.remember(settings)
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
