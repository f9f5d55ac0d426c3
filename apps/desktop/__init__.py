"""The window: `python -m apps.desktop`. `settings`, `history`, `system`: no tkinter."""
