"""Texts of the commands and names of files, as the window shows them."""

import re

OPTIONS = {
    "--model-width or --model-widths": "Network width",
    "--model-width": "Network width:",
    "--force-size": "Sizes: Exactly on the page Model",
    "--low-memory": "Low memory: On",
    "--quantize": "Weights in memory: bits",
    "--vocabulary": "Help, Words of the Model",
    "--base": "after the file, write",
}
"""An option of the commands -> what the window offers instead."""


def in_window(text: str) -> str:
    """`text` with the names of fields and menus for options; those of other commands stay."""
    for option, name in OPTIONS.items():
        text = re.sub(rf"(?<![\w-])(?<!torch )(?<!teacher ){option}(?![\w-])", name, text)
    return re.sub(r"Weights in memory: bits ([48])", r"Weights in memory: \1 bits", text)


def shortened(text: str, most: int) -> str:
    """`text` with at most this number of characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
