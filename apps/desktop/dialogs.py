"""Dialogs."""

import tkinter as tk
from tkinter import ttk
from typing import Literal

from apps.desktop.menus import SHORTCUTS


def show_details(
    window,
    message: str,
    *,
    details: str | None,
    title: str = "Details",
    wrap: Literal["none", "word"] = "none",
) -> tk.Toplevel:
    """A message with its details, to read and to copy."""
    top = _dialog(window, title)
    top.geometry("760x420")
    ttk.Label(top, text=message, wraplength=720, padding=12).pack(fill="x")
    buttons = ttk.Frame(top, padding=12)
    buttons.pack(side="bottom", fill="x")
    text = tk.Text(
        top,
        wrap=wrap,
        font="TkFixedFont" if wrap == "none" else "TkDefaultFont",
        relief="flat",
        padx=8,
        pady=8,
    )
    text.pack(fill="both", expand=True, padx=12)
    text.insert("1.0", details or "")
    text.configure(state="disabled")

    def copy() -> None:
        window.clipboard_clear()
        window.clipboard_append(f"{message}\n\n{details or ''}")

    ttk.Button(buttons, text="Close", command=top.destroy).pack(side="right")
    ttk.Button(buttons, text="Copy", command=copy).pack(side="right", padx=8)
    window.theme.paint(top)
    return top


def show_shortcuts(window) -> tk.Toplevel:
    """The keyboard shortcuts."""
    top = _dialog(window, "Keyboard Shortcuts")
    top.resizable(False, False)
    frame = ttk.Frame(top, padding=18)
    frame.pack()
    sign, joint = ("⌘", "") if window.theme.native else ("Ctrl", "+")
    for row, (what, key) in enumerate(SHORTCUTS):
        keys = key if key == "Escape" else sign + joint + key.replace("-", joint)
        ttk.Label(frame, text=what).grid(row=row, column=0, sticky="w", padx=(0, 30), pady=2)
        ttk.Label(frame, text=keys, style="Muted.TLabel").grid(row=row, column=1, sticky="e")
    window.theme.paint(top)
    return top


def _dialog(window, title: str) -> tk.Toplevel:
    top = tk.Toplevel(window)
    top.title(title)
    top.transient(window)
    top.bind("<Escape>", lambda _: (top.destroy(), "break")[1])
    return top
