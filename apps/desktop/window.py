"""The window: form on the left, picture on the right, history below."""

import contextlib
import dataclasses
import queue
import time
import tkinter as tk
import traceback
from pathlib import Path
from tkinter import ttk

from PIL import Image

from apps.desktop import system
from apps.desktop.dialogs import show_details, show_shortcuts
from apps.desktop.fields import model_label
from apps.desktop.form import Form
from apps.desktop.history import Entry, History, thumbnail
from apps.desktop.inputs import Inputs
from apps.desktop.menus import build_menus
from apps.desktop.painter import MaskPainter
from apps.desktop.pictures import Pictures
from apps.desktop.run import Run
from apps.desktop.settings import Settings, load_settings, save_settings
from apps.desktop.theme import Theme
from apps.desktop.widgets import Banner, Filmstrip, PictureView, scale
from apps.desktop.wording import in_window
from apps.worker.client import Worker
from apps.worker.messages import (
    Downloading,
    Event,
    Failed,
    Finished,
    Job,
    Loaded,
    Loading,
    Notice,
    Picture,
    Progress,
)
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError
from mlx_snapgen.settings import ModelChoice

POLL_BUSY, POLL_IDLE = 15, 60
"""Milliseconds between two polls of the worker's events."""
BUDGET = 0.015
"""Seconds of one poll; the other events wait, so that the window stays responsive."""
HISTORY_LIMIT = 100
MOST_NOTICES = 3
"""Of one job that are shown together, the last ones."""


class Window(tk.Tk):
    """The application.

    Args:
        data: folder of settings and history.
    """

    picture_menu: tk.Menu

    def __init__(self, data: Path):
        super().__init__(className="Mlx_snapgen")
        self.title("SnapGen")
        self.minsize(640, 480)
        self._settings_path = Path(data) / "settings.json"
        self.settings, notice = load_settings(self._settings_path)
        self.history = History(Path(data) / "history", HISTORY_LIMIT)
        self.inputs = Inputs(Path(data) / "inputs")
        self.pictures = Pictures(self)
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self.worker = Worker(self._deliver)
        self.run: Run | None = None
        self._loaded: tuple[ModelChoice, Description] | None = None
        self._words: dict[str, list[str]] | None = None
        self._wanted = ModelChoice()
        self._browsing = False
        """Whether the user looks at other pictures during a job."""
        self._closing = self._asked_to_close = False
        self.theme = Theme(self)
        self._build()
        build_menus(self)
        self.theme.apply(self.settings.appearance)
        self.form.show(self.settings)
        self._place()
        self.update_buttons()
        if notice is not None:
            self.banner.show(notice)
        self.protocol("WM_DELETE_WINDOW", self.close)
        self.after_idle(self.pictures.load_history)
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
        self.form = Form(
            side,
            self.theme,
            load=self.load_model,
            inputs=self.inputs,
            paint=self.pictures.paint_mask,
            paste=self.pictures.paste,
            tell=self.show_error,
        )
        self.form.grid(row=0, column=0, sticky="nsew")
        self.go = ttk.Button(side, text="Generate", style="Accent.TButton", command=self.toggle)
        self.go.grid(row=1, column=0, sticky="ew", padx=14, pady=12)
        key = "⌘↩" if self.theme.native else "Ctrl+Return"
        self.view = PictureView(self, f"Describe a picture,\nthen press {key}.", theme=self.theme)
        self.view.grid(row=0, column=1, sticky="nsew")
        for button in ("<Button-2>", "<Button-3>", "<Control-Button-1>"):
            self.view.bind(button, self._open_menu)
        self.painter = MaskPainter(self, self.theme, done=self.pictures.stop_painting)
        self.painter.grid(row=0, column=1, sticky="nsew")
        self.painter.grid_remove()
        if system.accept_drops(self, lambda path: self.form.start_from(str(path))):
            self.form.start.accepts_drops = True
        self.form.start.bind("<<Changed>>", lambda _: self.painter.close())
        self.banner = Banner(self, lambda text, details: show_details(self, text, details=details))
        self.banner.grid(row=1, column=1, sticky="ew")
        self.banner.hide()
        self._build_bar()
        self.strip = Filmstrip(
            self,
            self.theme,
            choose=self.pictures.show,
            use=self.pictures.use_settings,
            menu=self.pictures.show_menu,
            limit=self.history.limit,
        )
        self.strip.grid(row=3, column=1, sticky="ew", padx=(4, 8), pady=(0, 6))

    def _build_bar(self) -> None:
        bar = ttk.Frame(self, padding=(12, 8))
        bar.grid(row=2, column=1, sticky="ew")
        bar.columnconfigure(0, weight=1)
        self.status = tk.StringVar()
        ttk.Label(bar, textvariable=self.status, style="Muted.TLabel").grid(
            row=0, column=0, columnspan=4, sticky="ew"
        )
        self.progress = ttk.Progressbar(bar, maximum=1.0)
        self.progress.grid(row=1, column=0, sticky="ew", padx=(0, 6))
        self._actions = []
        for column, (text, command) in enumerate(
            (
                ("Use Settings", self.pictures.use_settings),
                ("Save…", self.pictures.save),
                ("Copy", self.pictures.copy),
            ),
            start=1,
        ):
            button = ttk.Button(bar, text=text, command=command)
            button.grid(row=1, column=column, padx=(6, 0), pady=(4, 0))
            self._actions.append(button)

    def _place(self) -> None:
        # X11 counts neither the menu bar nor the window's frame.
        room = 0 if self.theme.native else 30
        across = min(1080, self.winfo_screenwidth())
        self.geometry(f"{across}x{min(760, self.winfo_screenheight() - room)}")
        if self.settings.geometry:
            try:
                self.geometry(self.settings.geometry)
            except tk.TclError:
                return
            self.update_idletasks()
            # The screen of the last session may be disconnected.
            x, y = self.winfo_x(), self.winfo_y()
            if not (-50 <= x < self.winfo_screenwidth() and -50 <= y < self.winfo_screenheight()):
                self.geometry("+40+40")

    # --- drawing --------------------------------------------------------------------------------

    def toggle(self) -> None:
        """Generate, or cancel the running job."""
        if self.run is not None and self.run.can_cancel:
            self.cancel()
        else:
            self.generate()

    def generate(self) -> None:
        """Draw with the settings of the form."""
        if self.run is not None and self.run.draws:
            return
        self.pictures.stop_painting()
        try:
            settings = self.form.read(self.settings)
            if not settings.draw.prompt and settings.draw.image is None:
                raise UserError("the prompt is empty: say what to draw")
        except UserError as error:
            self.show_error(str(error))
            return
        if not settings.seed_locked:
            self.form.new_seed()
            draw = dataclasses.replace(settings.draw, seed=int(self.form.seed.get()))
            settings = dataclasses.replace(settings, draw=draw)
        self.remember(settings.with_inputs(self.form.start.paths))
        self.banner.hide()
        # One by one: each preview shows how one picture develops.
        draw = dataclasses.replace(self.form.effective(settings.draw), batch_size=1)
        self._start(Job(settings.choice, draw))

    def load_model(self) -> None:
        """Load the model of the form, after downloading it if necessary."""
        if self.run is not None and self.run.draws:
            return
        if self.run is not None:
            self.cancel()
        try:
            settings = self.form.read(self.settings)
        except UserError as error:
            self.show_error(str(error))
            return
        self.remember(settings)
        self._start(Job(settings.choice))

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
        self.run = Run(number, job.settings)
        self._wanted, self._browsing = job.choice, False
        self.progress.configure(value=0)
        self.status.set("Starting…")
        self.update_buttons()

    def remember(self, settings: Settings) -> None:
        """Save the settings of the form for the next start."""
        self.settings = settings
        self._save_settings()

    # --- events of the worker --------------------------------------------------------------------

    def _deliver(self, event: Event) -> None:
        """Called in the worker's thread; does the slow work that needs no widget."""
        extra = None
        if isinstance(event, Progress) and event.preview is not None:
            image = Image.frombytes("RGB", event.size, event.preview)
            extra = image, scale(image, self.view.space)
        elif isinstance(event, Picture):
            image = Image.frombytes("RGB", event.size, event.rgb)
            try:
                entry = self.history.add(event.name, event.file)
            except OSError as error:
                # The picture is still shown.
                self._events.put((Notice(event.job, f"cannot save pictures: {error}"), None))
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
            run = self.run
            if run is None or event.job != run.job:
                continue
            # Only the last of several previews is shown, to save time.
            shown = self._handle(event, run, extra=extra) or shown
        if shown is not None:
            self.view.show(*shown)
        if self._asked_to_close:
            self.close()
        if not self._closing:
            self.after(POLL_IDLE if self.run is None else POLL_BUSY, self._poll)

    def _handle(self, event: Event, run: Run, *, extra) -> tuple | None:
        """Show one event of the job; returns its pictures, if any."""
        run.take(event)
        self.status.set(run.status)
        self.progress.configure(value=run.share)
        if isinstance(event, Downloading | Loading):
            self.update_buttons()
        elif isinstance(event, Loaded):
            self._adopt(event, run)
        elif isinstance(event, Progress):
            if extra is None or self._browsing:
                return None
            if self.strip.selected is not None:
                self.strip.select(None)
                self.update_buttons()
            return extra
        elif isinstance(event, Picture):
            image, scaled, entry, small = extra
            if entry is not None:
                self.strip.add(entry, small)
            if self._browsing:
                return None
            self.strip.select(entry)
            self.update_buttons()
            return image, scaled
        elif isinstance(event, Notice):
            run.notices.append(event.text)
            self.banner.show("\n".join(map(_sentence, run.notices[-MOST_NOTICES:])))
        elif isinstance(event, Failed):
            self._end("")
            self.show_error(event.message, event.details)
            self._leave_model(run)
        elif isinstance(event, Finished):
            drawn = run.draws and not event.cancelled
            self._end("Stopped" if event.cancelled else run.summary if drawn else "Ready")
            self._leave_model(run)
        return None

    def _adopt(self, event: Loaded, run: Run) -> None:
        before, self._loaded = self._loaded, (event.choice, event.config)
        self._words = event.words
        other = before is not None and before[1].name != event.config.name
        if before is None or before[1] != event.config:
            self.form.adopt(event.config, forget=other and not run.draws)
        if event.choice.model is not None:
            name = model_label(event.choice)
            others = [m for m in self.settings.recent_models if m != name]
            self.remember(dataclasses.replace(self.settings, recent_models=(name, *others[:7])))
            self.form.model_page.offer_models(self.settings.recent_models)

    def _leave_model(self, run: Run) -> None:
        """Choose the former model again if the new one was not loaded."""
        if run.between_steps:
            return
        loaded = ModelChoice() if self._loaded is None else self._loaded[0]
        names = {name: getattr(loaded, name) for name in ("model", "revision", "base")}
        if all(getattr(self._wanted, name) == value for name, value in names.items()):
            return
        label = model_label(loaded)
        self.form.model.set(label)
        choice = dataclasses.replace(self.settings.choice, **names)
        self.remember(dataclasses.replace(self.settings, choice=choice))
        if self._loaded is None:
            self.load_model()
        else:
            self.status.set(f"The model is {label} again")

    def _end(self, status: str) -> None:
        self.run = None
        self.status.set(status)
        self.progress.configure(value=0)
        self.update_buttons()

    def show_picture(self, image: Image.Image | None, entry: Entry | None) -> None:
        """Show a picture, on which the commands then act."""
        self._browsing = self.run is not None and self.run.draws
        self.pictures.stop_painting()
        self.strip.select(entry)
        self.view.show(image)
        self.update_buttons()

    def _open_menu(self, event: tk.Event) -> str:
        if self.strip.selected is not None:
            self.picture_menu.tk_popup(event.x_root, event.y_root)
        return "break"

    def update_buttons(self) -> None:
        """Enable the buttons of the possible actions."""
        cancel = self.run is not None and self.run.can_cancel
        self.go.configure(text="Cancel" if cancel else "Generate")
        state = ["!disabled" if self.strip.selected is not None else "disabled"]
        for button in self._actions:
            button.state(state)

    def show_error(self, text: str, details: str | None = None) -> None:
        """Show an error, as a sentence."""
        self.banner.show(_sentence(text), details)

    def report_callback_exception(self, kind, value, trace) -> None:
        """Show a bug in a callback; the window stays open."""
        details = "".join(traceback.format_exception(kind, value, trace))
        self.banner.show(f"{kind.__name__}: {value}", details)

    # --- the window itself ----------------------------------------------------------------------

    def set_appearance(self, appearance: str) -> None:
        """ "light", "dark" or "system"."""
        self.settings = dataclasses.replace(self.settings, appearance=appearance)
        self.theme.apply(appearance)
        self._save_settings()

    def show_shortcuts(self) -> None:
        show_shortcuts(self)

    def show_words(self) -> None:
        """The words that the loaded model understands."""
        if self._loaded is None:
            self.show_error("the model is not loaded yet: wait until it is")
        elif self._words is None:
            self.show_error(f"{self._loaded[1].name} takes any words")
        else:
            title = f"{self._loaded[1].name} understands these words:"
            listed = "\n\n".join(f"{kind}: {', '.join(w)}" for kind, w in self._words.items())
            show_details(self, title, details=listed, title="Words of the Model", wrap="word")

    def close_soon(self) -> None:
        """Close at the next poll; for signals, which may arrive at any time."""
        self._asked_to_close = True

    def close(self) -> None:
        """Save the settings, stop drawing and end."""
        if self._closing:
            return
        self._closing = True
        self.pictures.stop_painting()
        # Wrong fields are not saved.
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
            self.banner.show(f"The settings cannot be saved: {error}")


def _sentence(text: str) -> str:
    text = in_window(text)
    return text[:1].upper() + text[1:]
