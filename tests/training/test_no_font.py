"""Training on a user's own pictures does not use the emoji font, nor the code that reads it."""

import subprocess
import sys

COMMANDS = (
    "autoencoder",
    "evaluate",
    "export",
    "flow",
    "kd",
    "kdmd",
    "lora",
    "new",
    "palettes",
    "prepare",
    "tokenizer",
)


def test_only_train_stickers_imports_what_reads_the_font():
    code = (
        "import sys\n"
        "sys.modules['train.data.stickers.render'] = None\n"
        "import importlib\n"
        f"for name in {COMMANDS}: importlib.import_module(f'train.{{name}}')\n"
        "try:\n"
        "    import train.stickers\n"
        "except ImportError as error:\n"
        "    print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "train.data.stickers.render\n"
