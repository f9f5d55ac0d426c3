"""`python -m mlx_snapgen.generate --interactive`: prompts one by one, the model stays loaded."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mlx_snapgen.cli.options import build_parser
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.settings import WIDTH_NAMES

try:
    import readline
except ImportError:  # Python may be built without it
    readline: ModuleType | None = None


class Setting(NamedTuple):
    """A line `:name VALUE` is the command's option with that value, for all later prompts."""

    option: str
    dest: str
    help: str
    values: tuple[str, ...] = ()


SETTINGS = {
    "negative": Setting("--negative-prompt", "negative_prompt", "what to keep out"),
    "seed": Setting("--seed", "seed", "of the next pictures (default: random each time)"),
    "images": Setting("--num-images", "num_images", "pictures per prompt"),
    "steps": Setting("--steps", "num_inference_steps", "denoising steps"),
    "guidance": Setting("--guidance", "guidance_scale", "how hard to follow the prompt; 1 is off"),
    "width": Setting("--model-width", "model_width", "of the network", WIDTH_NAMES),
    "model": Setting("--model", "model", "folder or Hugging Face repository"),
    "lora": Setting("--lora", "loras", "a file, and its scale"),
    "quantize": Setting("--quantize", "quantize", "bits per weight in memory", ("0", "4", "8")),
    "output": Setting("--output", "output", "a .png file, or a folder ending in /"),
}
RELOAD = {"model_width", "model", "loras", "quantize"}
"""Settings that another pipeline is loaded for."""
COMMANDS = (*SETTINGS, "size", "show", "help", "quit")
HISTORY_LENGTH = 1000


class Session:
    """The loop's state.

    Args:
        args: the command's options; settings are changed in it.
        load: gives the pipeline for `args`.
        draw: draws a prompt with a pipeline.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        load: Callable[[], Any],
        draw: Callable[[Any, str], None],
    ):
        self._args, self._load, self._draw = args, load, draw
        self._pipeline: Any = load()
        self._quiet = not sys.stdin.isatty()

    def run(self) -> None:
        """Read lines until there are no more, or `:quit`."""
        with _line_editing(self.complete):
            if not self._quiet:
                print("Say what to draw. :help lists the settings, Ctrl-D ends.")
            while True:
                try:
                    line = input("" if self._quiet else "> ").strip()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    print()
                    continue
                if line in (":quit", ":q", ":exit"):
                    return
                try:
                    self.take(line)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print("stopped", file=sys.stderr)

    def take(self, line: str) -> None:
        """Draw a prompt, or do what a line with a colon says; mistakes are `UserError`s."""
        if line.startswith(":"):
            name, _, value = line[1:].strip().partition(" ")
            self._command(name, value.strip())
        elif line:
            if self._pipeline is None:
                self._pipeline = self._load()
            self._draw(self._pipeline, line)

    def complete(self, text: str, before: str) -> list[str]:
        """What `text`, the last word of a line after `before`, may become."""
        if not before and text.startswith(":"):
            return [f":{name}" for name in COMMANDS if name.startswith(text[1:])]
        if before.startswith(":"):
            setting = SETTINGS.get(before[1:].strip())
            known = setting.values if setting is not None else ()
        else:
            vocabulary = getattr(self._pipeline, "vocabulary", None) or {}
            known = sorted({word for words in vocabulary.values() for word in words})
        return [word for word in known if word.startswith(text)] if text or before else []

    def _command(self, name: str, value: str) -> None:
        if name == "help":
            for setting, (_, _, text, _) in SETTINGS.items():
                print(f"  :{setting:10} {text}")
            print("  :size       WIDTHxHEIGHT of the picture in pixels")
            print("  :show       all settings\n  :quit       end; so does Ctrl-D")
            print("Without a value a setting goes back to its default.")
        elif name == "show":
            for setting, (_, dest, _, _) in SETTINGS.items():
                now = getattr(self._args, dest)
                print(f"  :{setting:10} {'default' if now is None else now}")
            size = (self._args.width, self._args.height)
            print("  :size       " + ("default" if None in size else "{}x{}".format(*size)))
        elif name == "size":
            self._size(value)
        elif name in SETTINGS:
            self._set(SETTINGS[name], value)
        else:
            raise UserError(f"no setting ':{name}'{nearest(name, COMMANDS)}; see :help")

    def _size(self, value: str) -> None:
        found = re.fullmatch(r"(\d+)\s*x\s*(\d+)", value)
        if value and not found:
            raise UserError(f"the size is like 192x128 (width x height), not '{value}'")
        width, height = (int(found[1]), int(found[2])) if found else (None, None)
        self._args.width, self._args.height = width, height

    def _set(self, setting: Setting, value: str) -> None:
        # The lora's file and scale are two words, a negative prompt is one.
        words = value.split() if setting.dest == "loras" else [value]
        given = [setting.option, *words] if value else []
        parsed = getattr(build_parser().parse_args(given), setting.dest)
        before = getattr(self._args, setting.dest)
        setattr(self._args, setting.dest, parsed)
        if setting.dest not in RELOAD:
            return
        self._pipeline = None
        try:
            self._pipeline = self._load()
        except UserError:
            # The next prompt loads what was there before.
            setattr(self._args, setting.dest, before)
            raise


def history_path() -> Path:
    """Where typed lines are remembered."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlx_snapgen" / "prompts"


@contextlib.contextmanager
def _line_editing(complete: Callable[[str, str], list[str]]):
    """Arrow keys, remembered lines and completion, where readline is there and somebody types."""
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = history_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LENGTH)

    def completer(text: str, state: int) -> str | None:
        before = readline.get_line_buffer()[: readline.get_begidx()]
        found = complete(text, before)
        return found[state] + " " if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completer)
    # macOS has libedit under the same name, with a language of its own.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
