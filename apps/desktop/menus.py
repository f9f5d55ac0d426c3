"""Menus and keyboard shortcuts: Command on a Mac, Control elsewhere."""

import tkinter as tk
from pathlib import Path

from apps.desktop import system

SHORTCUTS = (
    ("Generate or cancel", "Return"),
    ("Cancel", "Escape"),
    ("New seed", "D"),
    ("Keep the seed", "L"),
    ("Open a picture's settings", "O"),
    ("Use the picture's settings", "U"),
    ("Start from the picture", "I"),
    ("Start from the clipboard's picture", "Shift-V"),
    ("Save the picture", "S"),
    ("Copy the picture", "Shift-C"),
    ("Show the picture's file", "R"),
)

EDIT = "Edit This Picture"


def update_popup(window) -> None:
    """Enable what the model can do with a picture."""
    state = "normal" if window.form.start.can_edit else "disabled"
    window.picture_menu.entryconfigure(EDIT, state=state)


def build_menus(window) -> None:
    """Give `window` its menu bar and bind the shortcuts."""
    mac = window.theme.native
    modifier, label = ("Command", "Command-") if mac else ("Control", "Ctrl+")
    bar = tk.Menu(window, tearoff=False)

    def item(menu: tk.Menu, text: str, *, command, key: str | None = None) -> None:
        shown = ""
        if key is not None:
            shown = label + (key if mac else key.replace("-", "+"))
            *held, last = key.split("-")
            # With Shift the key symbol is an upper-case letter.
            symbol = last if len(last) > 1 else last.upper() if held else last.lower()
            sequence = "-".join((modifier, *held, symbol))
            window.bind(f"<{sequence}>", lambda _: (command(), "break")[1])
        menu.add_command(label=text, command=command, accelerator=shown)

    def submenu(text: str) -> tk.Menu:
        menu = tk.Menu(bar, tearoff=False)
        bar.add_cascade(label=text, menu=menu)
        return menu

    file = submenu("File")
    item(file, "Open Picture…", command=window.pictures.open, key="O")
    item(file, "Save Picture…", command=window.pictures.save, key="S")
    if not mac:
        file.add_separator()
        item(file, "Quit", command=window.close, key="Q")

    if window.theme.x11:
        _bind_usual_keys(window)
    edit = submenu("Edit")
    for text, event, key in (
        ("Undo", "<<Undo>>", "Z"),
        ("Cut", "<<Cut>>", "X"),
        ("Copy", "<<Copy>>", "C"),
        ("Paste", "<<Paste>>", "V"),
        ("Select All", "<<SelectAll>>", "A"),
    ):
        edit.add_command(
            label=text,
            accelerator=label + key,
            command=lambda event=event: (window.focus_get() or window).event_generate(event),
        )

    picture = submenu("Picture")
    locked = window.form.locked
    item(picture, "Generate or Cancel", command=window.toggle, key="Return")
    item(picture, "New Seed", command=window.form.new_seed, key="D")
    item(picture, "Keep the Seed", command=lambda: locked.set(not locked.get()), key="L")
    picture.add_separator()
    item(picture, "Use the Picture's Settings", command=window.pictures.use_settings, key="U")
    item(picture, "Start from the Picture", command=window.pictures.use_picture, key="I")
    item(picture, "Start from the Clipboard", command=window.pictures.paste, key="Shift-V")
    item(picture, "Copy Picture", command=window.pictures.copy, key="Shift-C")
    show = "Show in Finder" if system.MAC else "Show in Folder"
    item(picture, show, command=window.pictures.reveal, key="R")
    picture.add_command(
        label="Delete from History…",
        command=window.pictures.delete,
        accelerator="⌫" if mac else "Delete",
    )
    for key in ("<Delete>", "<BackSpace>"):
        window.bind(key, lambda e: _outside_text(e.widget) and window.pictures.delete())

    view = submenu("View")
    chosen = tk.StringVar(window, window.settings.appearance)
    for text in ("System", "Light", "Dark"):
        view.add_radiobutton(
            label=text,
            value=text.lower(),
            variable=chosen,
            command=lambda: window.set_appearance(chosen.get()),
        )
    window.appearance = chosen

    help_menu = submenu("Help")
    item(help_menu, "Words of the Model", command=window.show_words)
    item(help_menu, "Keyboard Shortcuts", command=window.show_shortcuts)

    popup = tk.Menu(window, tearoff=False, postcommand=lambda: update_popup(window))
    for text, command in (
        ("Use Settings", window.pictures.use_settings),
        ("Use This Picture", window.pictures.use_picture),
        (EDIT, window.pictures.edit_picture),
        ("Save…", window.pictures.save),
        ("Copy", window.pictures.copy),
        (show, window.pictures.reveal),
        ("Delete…", window.pictures.delete),
    ):
        popup.add_command(label=text, command=command)
    window.picture_menu = popup

    window.bind("<Escape>", lambda _: window.cancel())
    if mac:
        window.bind("<Command-period>", lambda _: window.cancel())
        window.createcommand("::tk::mac::Quit", window.close)
        window.createcommand(
            "::tk::mac::OpenDocument", lambda *names: window.pictures.open_picture(Path(names[0]))
        )
    # A text field would otherwise insert a line.
    for widget in (window.form.prompt, window.form.negative):
        widget.bind(f"<{modifier}-Return>", lambda _: (window.toggle(), "break")[1])
    window.configure(menu=bar)


def _bind_usual_keys(window) -> None:
    """X11's text fields have the keys of Emacs; these mean something else in the menus."""
    window.event_delete("<<LineStart>>", "<Control-Key-a>", "<Control-Lock-Key-A>")
    window.event_add("<<SelectAll>>", "<Control-Key-a>", "<Control-Lock-Key-A>")
    for kind in ("Text", "TEntry", "TSpinbox", "TCombobox"):
        for letter in "doi":
            window.unbind_class(kind, f"<Control-Key-{letter}>")


def _outside_text(widget) -> bool:
    return isinstance(widget, tk.Misc) and widget.winfo_class() in ("Canvas", "Tk", "TButton")
