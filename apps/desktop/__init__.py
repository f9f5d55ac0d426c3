"""The window: `python -m apps.desktop`. `settings`, `history` and `system` know no tkinter."""
