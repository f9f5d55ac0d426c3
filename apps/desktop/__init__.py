"""The window: `python -m apps.desktop`.

`settings`, `history` and `system` do not import tkinter.
"""
