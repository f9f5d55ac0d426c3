"""The window: form on the left, picture on the right, history below."""

import contextlib
import dataclasses
import queue
import time
import tkinter as tk
import traceback
from pathlib import Path
from tkinter import filedialog, messagebox, ttk

from PIL import Image

from apps.desktop import system
from apps.desktop.dialogs import show_details, show_shortcuts
from apps.desktop.form import Form
from apps.desktop.history import Entry, History, thumbnail
from apps.desktop.menus import build_menus
from apps.desktop.run import Run
from apps.desktop.settings import load_settings, save_settings, write_whole
from apps.desktop.theme import Theme
from apps.desktop.widgets import Banner, Filmstrip, PictureView, scale
from apps.worker import (
    Downloading,
    Event,
    Failed,
    Finished,
    Job,
    Loaded,
    Loading,
    ModelChoice,
    Notice,
    Picture,
    Progress,
    Worker,
)
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError

POLL_BUSY, POLL_IDLE = 15, 60
"""Milliseconds between two looks for what the worker says."""
BUDGET = 0.015
"""Seconds of one look; the rest waits, so that the window stays alive."""
HISTORY_LIMIT = 100


class Window(tk.Tk):
    """The application.

    Args:
        data: folder of settings and history.
    """

    def __init__(self, data: Path):
        super().__init__(className="Mlx_snapgen")
        self.title("SnapGen")
        self.minsize(820, 560)
        self._settings_path = Path(data) / "settings.json"
        self.settings, notice = load_settings(self._settings_path)
        self.history = History(Path(data) / "history", HISTORY_LIMIT)
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self.worker = Worker(self._deliver)
        self.run: Run | None = None
        self._loaded: tuple[ModelChoice, ModelConfig] | None = None
        self._closing = self._asked_to_close = False
        self.theme = Theme(self)
        self._build()
        build_menus(self)
        self.theme.apply(self.settings.appearance)
        self.form.show(self.settings)
        self._place()
        self._update_buttons()
        if notice is not None:
            self.banner.show(notice)
        self.protocol("WM_DELETE_WINDOW", self.close)
        self._old_pictures = self.history.load()
        self.after_idle(self._load_history)
        self.after_idle(self.load_model)
        self.after(POLL_IDLE, self._poll)
        self.form.prompt.focus_set()

    # --- building -------------------------------------------------------------------------------

    def _build(self) -> None:
        self.columnconfigure(1, weight=1)
        self.rowconfigure(0, weight=1)
        side = ttk.Frame(self)
        side.grid(row=0, column=0, rowspan=4, sticky="ns")
        side.rowconfigure(0, weight=1)
        self.form = Form(side, self.theme, self.load_model)
        self.form.grid(row=0, column=0, sticky="nsew")
        self.go = ttk.Button(side, text="Generate", style="Accent.TButton", command=self.toggle)
        self.go.grid(row=1, column=0, sticky="ew", padx=14, pady=12)
        key = "⌘↩" if self.theme.native else "Ctrl+Return"
        self.view = PictureView(self, f"Say what to draw,\nthen press {key}.", self.theme)
        self.view.grid(row=0, column=1, sticky="nsew")
        self.banner = Banner(self, lambda *texts: show_details(self, *texts))
        self.banner.grid(row=1, column=1, sticky="ew")
        self.banner.hide()
        self._build_bar()
        self.strip = Filmstrip(self, self.theme, self.restore, self._entry_menu, self.history.limit)
        self.strip.grid(row=3, column=1, sticky="ew", padx=(4, 8), pady=(0, 6))

    def _build_bar(self) -> None:
        bar = ttk.Frame(self, padding=(12, 8))
        bar.grid(row=2, column=1, sticky="ew")
        bar.columnconfigure(0, weight=1)
        self.status = tk.StringVar()
        ttk.Label(bar, textvariable=self.status, style="Muted.TLabel").grid(
            row=0, column=0, sticky="ew"
        )
        self.progress = ttk.Progressbar(bar, maximum=1.0)
        self.progress.grid(row=1, column=0, sticky="ew", pady=(4, 0), padx=(0, 6))
        self._actions = []
        for column, (text, command) in enumerate(
            (
                ("Save…", self.save),
                ("Copy", self.copy),
                ("Show in Finder" if system.MAC else "Show in folder", self.reveal),
            ),
            start=1,
        ):
            button = ttk.Button(bar, text=text, command=command)
            button.grid(row=0, column=column, rowspan=2, padx=(6, 0))
            self._actions.append(button)

    def _place(self) -> None:
        self.geometry("1080x760")
        if self.settings.geometry:
            try:
                self.geometry(self.settings.geometry)
            except tk.TclError:
                return
            self.update_idletasks()
            # A screen that is gone would take the window with it.
            x, y = self.winfo_x(), self.winfo_y()
            if not (-50 <= x < self.winfo_screenwidth() and -50 <= y < self.winfo_screenheight()):
                self.geometry("+40+40")

    # --- drawing --------------------------------------------------------------------------------

    def toggle(self) -> None:
        """Generate, or cancel what runs."""
        if self.run is not None and self.run.can_cancel:
            self.cancel()
        else:
            self.generate()

    def generate(self) -> None:
        """Draw what the form says."""
        if self.run is not None and self.run.draws:
            return
        try:
            settings = self.form.read(self.settings)
            if not settings.prompt:
                raise UserError("the prompt is empty: say what to draw")
        except UserError as error:
            self.banner.show(_sentence(str(error)))
            return
        if not settings.seed_locked:
            self.form.new_seed()
            settings = dataclasses.replace(settings, seed=int(self.form.seed.get()))
        self._remember(settings)
        self.banner.hide()
        self._start(settings.job())

    def load_model(self) -> None:
        """Load the model of the form, fetching it first if need be."""
        if self.run is not None and self.run.draws:
            return
        if self.run is not None:
            self.cancel()
        try:
            settings = self.form.read(self.settings)
        except UserError as error:
            self.banner.show(_sentence(str(error)))
            return
        self._remember(settings)
        self._start(Job(settings.choice(), None))

    def cancel(self) -> None:
        """Stop after this step; a download or a load stops at once."""
        if self.run is None:
            return
        if self.run.between_steps:
            self.worker.cancel(self.run.job)
            self.status.set("Stopping…")
        else:
            self.worker.interrupt()

    def _start(self, job: Job) -> None:
        number = self.worker.submit(job)
        self.run = Run(number, draws=job.prompt is not None, num_images=job.num_images)
        self.progress.configure(value=0)
        self.status.set("Starting…")
        self._update_buttons()

    def _remember(self, settings) -> None:
        if settings.model is not None:
            name = settings.model
            if settings.revision is not None:
                name += f"@{settings.revision}"
            others = [m for m in settings.recent_models if m != name]
            settings = dataclasses.replace(settings, recent_models=(name, *others[:7]))
        self.settings = settings
        self._save_settings()

    # --- what the worker says -------------------------------------------------------------------

    def _deliver(self, event: Event) -> None:
        """In the worker's thread: all that takes time and touches no widget."""
        extra = None
        if isinstance(event, Progress) and event.preview is not None:
            image = Image.frombytes("RGB", event.size, event.preview)
            extra = image, scale(image, self.view.space)
        elif isinstance(event, Picture):
            image = Image.frombytes("RGB", event.size, event.rgb)
            try:
                entry = self.history.add(event.name, event.png)
            except OSError as error:
                # The next event is shown after this one: the picture itself is not lost.
                self._events.put((Notice(event.job, f"cannot keep pictures: {error}"), None))
                entry = None
            extra = image, scale(image, self.view.space), entry, thumbnail(image)
        self._events.put((event, extra))

    def _poll(self) -> None:
        started = time.perf_counter()
        shown = None
        while time.perf_counter() - started < BUDGET:
            try:
                event, extra = self._events.get_nowait()
            except queue.Empty:
                break
            if self.run is None or event.job != self.run.job:
                continue
            # Of several previews only the last is worth the time.
            shown = self._handle(event, extra) or shown
        if shown is not None:
            self.view.show(*shown)
        if self._asked_to_close:
            self.close()
        if not self._closing:
            self.after(POLL_IDLE if self.run is None else POLL_BUSY, self._poll)

    def _handle(self, event: Event, extra) -> tuple | None:
        """Take in one event; the pictures to show for it, if any."""
        self.run.take(event)
        self.status.set(self.run.status)
        self.progress.configure(value=self.run.share)
        if isinstance(event, Downloading | Loading):
            self._update_buttons()
        elif isinstance(event, Loaded):
            self._adopt(event)
        elif isinstance(event, Progress):
            return extra
        elif isinstance(event, Picture):
            image, scaled, entry, small = extra
            if entry is not None:
                self.strip.add(entry, small)
                self.strip.select(entry)
            self._update_buttons()
            return image, scaled
        elif isinstance(event, Notice):
            self.banner.show(_sentence(event.text))
        elif isinstance(event, Failed):
            self._end("")
            self.banner.show(_sentence(event.message), event.details)
        elif isinstance(event, Finished):
            drawn = self.run.draws and not event.cancelled
            self._end("Stopped" if event.cancelled else self.run.summary if drawn else "Ready")
        return None

    def _adopt(self, event: Loaded) -> None:
        before, self._loaded = self._loaded, (event.choice, event.config)
        other = before is not None and before[1].name != event.config.name
        if before is None or before[1] != event.config:
            self.form.adopt(event.config, forget=other and not self.run.draws)

    def _end(self, status: str) -> None:
        self.run = None
        self.status.set(status)
        self.progress.configure(value=0)
        self._update_buttons()

    def _update_buttons(self) -> None:
        cancel = self.run is not None and self.run.can_cancel
        self.go.configure(text="Cancel" if cancel else "Generate")
        state = ["!disabled" if self.strip.selected is not None else "disabled"]
        for button in self._actions:
            button.state(state)

    def report_callback_exception(self, kind, value, trace) -> None:
        """A bug in a callback: shown, and the window goes on."""
        details = "".join(traceback.format_exception(kind, value, trace))
        self.banner.show(f"{kind.__name__}: {value}", details)

    # --- history and files ----------------------------------------------------------------------

    def _load_history(self) -> None:
        """A few thumbnails at a time, so that the window is there at once."""
        started = time.perf_counter()
        for entry, small in self._old_pictures:
            if entry not in self.strip.entries:
                self.strip.add(entry, small, at_end=True)
            if time.perf_counter() - started > BUDGET:
                self.after(5, self._load_history)
                return

    def restore(self, entry: Entry) -> None:
        """Show a picture of the history and take its settings into the form."""
        if self.run is None or not self.run.draws:
            self.open_picture(entry.path)
        else:
            self._restore_settings(entry.path)
        self._update_buttons()

    def open_picture(self, path: Path) -> None:
        """Take the settings out of a PNG, and show it."""
        if self._restore_settings(path):
            with Image.open(path) as image:
                self.view.show(image.convert("RGB"))

    def _restore_settings(self, path: Path) -> bool:
        try:
            settings = self.form.read(self.settings)
        except UserError:
            settings = self.settings
        try:
            settings = settings.restored(path)
        except UserError as error:
            self.banner.show(_sentence(str(error)))
            return False
        self.banner.hide()
        self.form.show(settings)
        self._remember(settings)
        return True

    def open(self) -> None:
        """Ask for a PNG to take the settings from."""
        path = filedialog.askopenfilename(parent=self, filetypes=[("PNG", "*.png")])
        if path:
            self.open_picture(Path(path))

    def save(self) -> None:
        """Ask where to, and save the selected picture."""
        entry = self.strip.selected
        if entry is None:
            return
        path = filedialog.asksaveasfilename(
            parent=self,
            initialdir=self.settings.folder or None,
            initialfile=f"{entry.name}.png",
            defaultextension=".png",
            filetypes=[("PNG", "*.png")],
        )
        if path:
            self.save_to(entry, Path(path))

    def save_to(self, entry: Entry, path: Path) -> None:
        """Save a picture of the history with its settings; the dialog has asked about replacing."""
        try:
            write_whole(path, entry.path.read_bytes())
        except OSError as error:
            self.banner.show(f"Cannot save {path}: {error.strerror or error}")
            return
        self.settings = dataclasses.replace(self.settings, folder=str(path.parent))
        self.status.set(f"Saved {path.name}")

    def copy(self) -> None:
        """Put the selected picture on the clipboard."""
        self._with_selected(system.copy_picture, "Copied")

    def reveal(self) -> None:
        """Show the selected picture's file."""
        self._with_selected(system.reveal, "")

    def _with_selected(self, action, said: str) -> None:
        if self.strip.selected is None:
            return
        try:
            action(self.strip.selected.path)
        except UserError as error:
            self.banner.show(_sentence(str(error)))
        else:
            self.status.set(said)

    def delete(self) -> None:
        """Delete the selected picture from the history, after asking."""
        entry = self.strip.selected
        question = "Delete this picture from the history? Saved copies stay."
        if entry is not None and messagebox.askokcancel("Delete", question, parent=self):
            self.history.delete(entry)
            self.strip.remove(entry)
            self.strip.select(None)
            self.view.show(None)
            self._update_buttons()

    def _entry_menu(self, entry: Entry, x: int, y: int) -> None:
        self.strip.select(entry)
        self._update_buttons()
        self.picture_menu.tk_popup(x, y)

    # --- the window itself ----------------------------------------------------------------------

    def set_appearance(self, appearance: str) -> None:
        """ "light", "dark" or "system"."""
        self.settings = dataclasses.replace(self.settings, appearance=appearance)
        self.theme.apply(appearance)
        self._save_settings()

    def show_shortcuts(self) -> None:
        show_shortcuts(self)

    def close_soon(self) -> None:
        """For signals, which come in the middle of anything."""
        self._asked_to_close = True

    def close(self) -> None:
        """Remember everything and end; what is being drawn stops."""
        if self._closing:
            return
        self._closing = True
        # A field that makes no sense is not remembered.
        with contextlib.suppress(UserError):
            self.settings = self.form.read(self.settings)
        self.settings = dataclasses.replace(self.settings, geometry=self.geometry())
        self._save_settings()
        self.withdraw()
        self.update_idletasks()
        self.worker.close(timeout=3.0)
        self.destroy()

    def _save_settings(self) -> None:
        try:
            save_settings(self._settings_path, self.settings)
        except OSError as error:
            self.banner.show(f"The settings cannot be kept: {error}")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
