"""Rendered sticker scenes, the default model's training pictures."""
