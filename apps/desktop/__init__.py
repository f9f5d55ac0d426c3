"""The window: `python -m apps.desktop`.

`fields`, `settings`, `history` and `system` do not import tkinter.
"""
