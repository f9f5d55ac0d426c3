"""Light and dark appearance: the native theme on a Mac, elsewhere ttk's clam in these colors."""

import tkinter as tk
from dataclasses import dataclass
from tkinter import font, ttk
from typing import Any, cast

from apps.desktop.system import prefers_dark


@dataclass(frozen=True)
class Palette:
    window: str
    field: str
    button: str
    hover: str
    border: str
    text: str
    muted: str
    accent: str
    accent_hover: str
    stage: str
    """Background of the picture."""
    warning: str


LIGHT = Palette(
    window="#f5f5f7",
    field="#ffffff",
    button="#ffffff",
    hover="#ececef",
    border="#d2d2d7",
    text="#1d1d1f",
    muted="#6e6e73",
    accent="#0a6cdb",
    accent_hover="#085ab8",
    stage="#e8e8ed",
    warning="#fff3d6",
)
DARK = Palette(
    window="#1e1e20",
    field="#2a2a2d",
    button="#3a3a3e",
    hover="#47474c",
    border="#48484d",
    text="#f2f2f4",
    muted="#a1a1a8",
    accent="#2b87f0",
    accent_hover="#4a9bf5",
    stage="#131314",
    warning="#4a3d1c",
)


class Theme:
    """Colors of all widgets below `root`; `palette` is the one in use."""

    def __init__(self, root: tk.Tk):
        self._root = root
        self.palette = LIGHT
        self.native = root.tk.call("tk", "windowingsystem") == "aqua"
        self.x11 = root.tk.call("tk", "windowingsystem") == "x11"
        self._fonts()

    def _fonts(self) -> None:
        default = font.nametofont("TkDefaultFont")
        size = default.actual("size")
        family = default.actual("family")
        self.heading = font.Font(family=family, size=size, weight="bold")
        self.small = font.Font(family=family, size=max(8, size - 1))
        self.large = font.Font(family=family, size=size + 4)

    def apply(self, appearance: str) -> None:
        """Use "light", "dark" or the system's choice, "system"."""
        dark = prefers_dark() if appearance == "system" else appearance == "dark"
        self.palette = DARK if dark else LIGHT
        if self.native:
            style = {"system": "auto", "dark": "darkaqua", "light": "aqua"}.get(appearance, "auto")
            self._root.tk.call("::tk::unsupported::MacWindowStyle", "appearance", self._root, style)
            self._named_styles(ttk.Style(self._root))
        else:
            self._clam()
        self.paint(self._root)

    def paint(self, widget: tk.Misc) -> None:
        """Color the widgets that ttk's styles do not reach, from `widget` down."""
        p = self.palette
        # On a Mac these color names follow the system's appearance.
        window = "systemWindowBackgroundColor" if self.native else p.window
        field = "systemTextBackgroundColor" if self.native else p.field
        text = "systemTextColor" if self.native else p.text
        kind = widget.winfo_class()
        style: dict[str, Any] = {}
        if isinstance(widget, tk.Tk | tk.Toplevel):
            style = {"background": window}
        elif kind == "Text":
            muted = getattr(widget, "muted", False)
            style = {
                "background": window if muted else field,
                "foreground": p.muted if muted else text,
                "insertbackground": text,
                "selectbackground": p.accent,
                "selectforeground": "#ffffff",
                "highlightbackground": p.border,
                "highlightcolor": p.accent,
            }
        elif kind == "Canvas":
            stage = getattr(widget, "on_stage", False)
            style = {"background": p.stage if stage else window}
        elif kind == "Menu" and not self.native:
            style = {
                "background": p.window,
                "foreground": p.text,
                "activebackground": p.accent,
                "activeforeground": "#ffffff",
                "borderwidth": 0,
            }
        if style:
            cast(tk.Widget, widget).configure(**style)
        widget.event_generate("<<Painted>>")
        for child in widget.winfo_children():
            self.paint(child)

    def _named_styles(self, style: ttk.Style) -> None:
        p = self.palette
        style.configure("Heading.TLabel", font=self.heading)
        style.configure("Muted.TLabel", foreground=p.muted, font=self.small)
        style.configure("Banner.TFrame", background=p.warning)
        style.configure("Banner.TLabel", background=p.warning, foreground=p.text)

    def _clam(self) -> None:
        p, style = self.palette, ttk.Style(self._root)
        style.theme_use("clam")
        style.configure(
            ".",
            background=p.window,
            foreground=p.text,
            fieldbackground=p.field,
            bordercolor=p.border,
            lightcolor=p.border,
            darkcolor=p.border,
            troughcolor=p.border,
            selectbackground=p.accent,
            selectforeground="#ffffff",
            insertcolor=p.text,
            arrowcolor=p.muted,
            focuscolor=p.accent,
            relief="flat",
        )
        flat = {"lightcolor": p.button, "darkcolor": p.button}
        hover = [("disabled", p.window), ("pressed", p.border), ("active", p.hover)]
        gray = [("disabled", p.muted)]
        for name in ("TButton", "Toolbutton", "TMenubutton"):
            style.configure(
                name, background=p.button, padding=(9, 4), anchor="center", width=-5, **flat
            )
            style.map(name, background=hover, foreground=gray, lightcolor=hover, darkcolor=hover)
        style.configure("TNotebook", borderwidth=0, tabmargins=(14, 8, 14, 0))
        style.configure("TNotebook.Tab", padding=(14, 5), background=p.window, borderwidth=1)
        style.map(
            "TNotebook.Tab",
            background=[("selected", p.button), ("active", p.hover)],
            lightcolor=[("selected", p.button)],
            foreground=[("!selected", p.muted)],
        )
        chosen = [("disabled", p.window), ("selected", p.accent), *hover]
        style.map(
            "Toolbutton",
            background=chosen,
            lightcolor=chosen,
            darkcolor=chosen,
            foreground=[("disabled", p.muted), ("selected", "#ffffff")],
        )
        accent = [("disabled", p.border), ("pressed", p.accent_hover), ("active", p.accent_hover)]
        style.configure(
            "Accent.TButton",
            background=p.accent,
            foreground="#ffffff",
            bordercolor=p.accent,
            lightcolor=p.accent,
            darkcolor=p.accent,
            font=self.heading,
            padding=(9, 7),
        )
        style.map("Accent.TButton", background=accent, lightcolor=accent, darkcolor=accent)
        style.configure("Small.Accent.TButton", padding=(9, 4))
        for name in ("TEntry", "TSpinbox", "TCombobox"):
            style.configure(name, padding=4, lightcolor=p.field, darkcolor=p.field)
            style.map(
                name,
                bordercolor=[("focus", p.accent)],
                lightcolor=[("focus", p.accent)],
                fieldbackground=[("disabled", p.window), ("readonly", p.field)],
                foreground=[("disabled", p.muted), ("readonly", p.text)],
                background=[("active", p.hover)],
            )
            style.configure(name, background=p.button, arrowsize=12)
        for name in ("TCheckbutton", "TRadiobutton"):
            style.configure(
                name, indicatorbackground=p.field, indicatorforeground="#ffffff", padding=2
            )
            style.map(
                name,
                indicatorbackground=[("selected", p.accent)],
                background=[("active", p.window)],
            )
        for way, sticky in (("Horizontal", "we"), ("Vertical", "ns")):
            thumb = (f"{way}.Scrollbar.thumb", {"expand": "1", "sticky": "nswe"})
            trough = (f"{way}.Scrollbar.trough", {"children": [thumb], "sticky": sticky})
            layout: Any = [trough]
            style.layout(f"{way}.TScrollbar", layout)
        style.configure("TScrollbar", arrowsize=9, bordercolor=p.window)
        style.configure("TScrollbar", background=p.button, troughcolor=p.window, gripcount=0)
        bare = [("disabled", p.window)]
        style.map(
            "TScrollbar",
            background=[*bare, ("active", p.hover)],
            bordercolor=bare,
            lightcolor=bare,
            darkcolor=bare,
        )
        style.configure(
            "Horizontal.TScale",
            background=p.accent,
            lightcolor=p.accent,
            darkcolor=p.accent,
            bordercolor=p.border,
            sliderlength=14,
            gripcount=0,
        )
        style.map("Horizontal.TScale", background=[("active", p.accent_hover)])
        style.configure(
            "Horizontal.TProgressbar",
            background=p.accent,
            lightcolor=p.accent,
            darkcolor=p.accent,
            bordercolor=p.border,
            thickness=6,
        )
        self._named_styles(style)
        # The list of a combobox is a Tk listbox that is created later; only options set its colors.
        for option, value in (
            ("background", p.field),
            ("foreground", p.text),
            ("selectBackground", p.accent),
            ("selectForeground", "#ffffff"),
        ):
            self._root.option_add(f"*TCombobox*Listbox.{option}", value)
