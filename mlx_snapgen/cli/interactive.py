"""`python -m mlx_snapgen.generate --interactive`: a loop of prompts, with the model loaded."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from mlx_snapgen.cli.generate_options import Saving, build_parser
from mlx_snapgen.cli.notices import print_vocabulary
from mlx_snapgen.cli.options import draw_settings, model_choice
from mlx_snapgen.description import Description
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.fitting import FITS
from mlx_snapgen.reading import read_line
from mlx_snapgen.settings import WIDTH_NAMES, DrawSettings, ModelChoice
from mlx_snapgen.vocabulary import nouns

readline: ModuleType | None
try:
    import readline
except ImportError:  # Python may be built without it
    readline = None


class Setting(NamedTuple):
    """A line `:name VALUE` sets the command's option to that value, for all later prompts."""

    option: str
    dest: str
    help: str
    values: tuple[str, ...] = ()


SWITCH = ("on", "off")

SETTINGS = {
    "negative": Setting("--negative-prompt", "negative_prompt", "what to keep out of the picture"),
    "seed": Setting("--seed", "seed", "seed of the next pictures (default: random each time)"),
    "images": Setting("--num-images", "num_images", "number of pictures per prompt"),
    "batch-size": Setting(
        "--batch-size", "batch_size", "pictures drawn at a time (default: by the memory)"
    ),
    "width": Setting("--width", "width", "width of the picture in pixels"),
    "height": Setting("--height", "height", "height of the picture in pixels"),
    "force-size": Setting(
        "--force-size", "force_size", "draw sizes that the model was not trained on", SWITCH
    ),
    "steps": Setting("--steps", "num_inference_steps", "denoising steps"),
    "guidance": Setting("--guidance", "guidance_scale", "guidance scale; 1 is off"),
    "few-step": Setting("--few-step", "few_step", "the model's few-step mode", SWITCH),
    "attention-modulation": Setting(
        "--attention-modulation", "attention_modulation", "that of the EDT paper", SWITCH
    ),
    "image": Setting(
        "--image", "image", "picture to start from, then its strength; last is the last one drawn"
    ),
    "strength": Setting("--image", "strength", "how much of the picture is redrawn, up to 1"),
    "mask": Setting("--mask", "mask", "picture that is transparent or white where to redraw"),
    "edit": Setting("--edit", "edit", "pictures that the prompt is about, or last"),
    "fit": Setting("--fit", "fit", "how pictures get another aspect ratio", FITS),
    "model-width": Setting("--model-width", "model_width", "network width", WIDTH_NAMES),
    "model": Setting(
        "--model", "model", "folder, Hugging Face repository, or FILE.safetensors and its base"
    ),
    "revision": Setting("--revision", "revision", "branch, tag or commit of a repository"),
    "base": Setting("--base", "base", "model with the other parts of FILE.safetensors"),
    "lora": Setting("--lora", "loras", "LoRA file, then its scale; several may follow"),
    "quantize": Setting("--quantize", "quantize", "bits per weight", ("none", "4", "8")),
    "text-encoders": Setting("--text-encoders", "text_encoders", "load only these, as clip,gemma"),
    "keep-text-encoders": Setting(
        "--keep-text-encoders", "keep_text_encoders", "keep them in memory while drawing", SWITCH
    ),
    "low-memory": Setting(
        "--low-memory", "low_memory", "less memory for a public model, slower", SWITCH
    ),
    "output": Setting("--output", "output", "a .png file, or a folder ending in /"),
    "metadata": Setting("--metadata", "metadata", "store prompt and settings in pictures", SWITCH),
    "stepwise-dir": Setting(
        "--stepwise-dir", "stepwise_dir", "folder for the estimates after each step"
    ),
}
COMMANDS = (*SETTINGS, "size", "vocabulary", "show", "help", "quit")
REFUSED = (
    *("cache-limit", "config-from-image", "interactive", "json", "prompts-file", "trust-settings"),
)
"""Options of the command that cannot change here."""
RENAMED = {"width": "model-width"}
"""Old name of a setting, with its values -> today's name."""
HISTORY_LENGTH = 1000


Load = Callable[[ModelChoice, DrawSettings], Any]
"""Loads the pipeline of a choice, if its model can draw with the settings."""


class Draw(Protocol):
    """Draws with a pipeline."""

    def __call__(self, pipeline: Any, settings: DrawSettings, *, saving: Saving) -> Any:
        """Returns the file of the last picture."""
        ...


class Session:
    """The loop's state.

    Args:
        settings: of the first prompt; lines that start with a colon change them.
        choice: the model; lines that start with a colon select another one.
        saving: how pictures are saved.
    """

    def __init__(
        self,
        settings: DrawSettings,
        choice: ModelChoice,
        *,
        saving: Saving,
        load: Load,
        draw: Draw,
    ):
        self._settings, self._choice, self._saving = settings, choice, saving
        self._load, self._draw = load, draw
        self._last: Any = None
        self._pipeline: Any = load(choice, settings)
        self._quiet = not sys.stdin.isatty()

    def run(self) -> None:
        """Read lines until the end of the input or `:quit`."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            # Bytes that are not UTF-8 are a mistake in their line; strict decoding ends the loop.
            sys.stdin.reconfigure(errors="surrogateescape")
        with _line_editing(self.complete):
            first = True
            if not self._quiet:
                print("Type a prompt. :help lists the settings, Ctrl-D ends.")
            while True:
                try:
                    line = read_line(sys.stdin, "stdin") if self._quiet else input("> ")
                except EOFError:
                    return
                except KeyboardInterrupt:
                    print()
                    continue
                if self._quiet and not line:
                    return
                # Some editors start a file with a byte-order mark.
                line = (line.removeprefix("\ufeff") if first else line).strip()
                first = False
                if line in (":quit", ":q", ":exit"):
                    return
                try:
                    self.take(line)
                except UserError as error:
                    print(f"error: {as_settings(str(error))}", file=sys.stderr)
                except KeyboardInterrupt:
                    print("stopped", file=sys.stderr)

    def take(self, line: str) -> None:
        """Draw a prompt, or execute a line that starts with a colon; `UserError` for a mistake."""
        try:
            line.encode()
        except UnicodeEncodeError:
            raise UserError("the line has characters that are not valid UTF-8") from None
        if line.startswith(":"):
            name, _, value = line[1:].strip().partition(" ")
            self._command(name, value.strip())
        elif line:
            settings = dataclasses.replace(self._settings, prompt=line)
            self._last = self._draw(self._loaded, settings, saving=self._saving)

    def complete(self, text: str, before: str) -> list[str]:
        """Completions of `text`, the last word of a line after `before`."""
        if not before and text.startswith(":"):
            return [f":{name}" for name in COMMANDS if name.startswith(text[1:])]
        if before.startswith(":"):
            setting = SETTINGS.get(before[1:].strip())
            known = setting.values if setting is not None else ()
        else:
            vocabulary = getattr(self._pipeline, "vocabulary", None) or {}
            # Not the words that are replaced, left out or drawn badly.
            known = {*nouns(vocabulary)} - {*vocabulary.get("misspelled", ())}
            known |= {*vocabulary.get("colours", ()), *vocabulary.get("backgrounds", ())}
            known = sorted(known)
        return [word for word in known if word.startswith(text)] if text or before else []

    def _command(self, name: str, value: str) -> None:
        if name in RENAMED and value in SETTINGS[RENAMED[name]].values:
            print(f"warning: :{name} {value} is now :{RENAMED[name]} {value}", file=sys.stderr)
            name = RENAMED[name]
        name = OPTIONS.get(name, name)
        if name == "help":
            for setting, (_, _, text, values) in SETTINGS.items():
                more = f" ({', '.join(values)})" if values else ""
                print(f"  :{setting:20} {text}{more}")
            print(f"  :{'size':20} WIDTHxHEIGHT of the picture in pixels")
            print(f"  :{'vocabulary':20} the words that the model understands")
            print(f"  :{'show':20} all settings\n  :{'quit':20} end; so does Ctrl-D")
            print("A setting without a value is reset to its default.")
        elif name == "show":
            values = vars(self._settings) | vars(self._choice) | vars(self._saving)
            for setting, (_, dest, _, _) in SETTINGS.items():
                print(f"  :{setting:20} {as_typed(dest, values[dest])}")
            size = self._settings.width, self._settings.height
            print(f"  :{'size':20} " + ("default" if None in size else "{}x{}".format(*size)))
        elif name == "vocabulary":
            print_vocabulary(self._loaded.vocabulary, self._loaded.config.name)
        elif name == "size":
            self._size(value)
        elif name in SETTINGS:
            self._set(SETTINGS[name], value)
        elif name in REFUSED:
            raise UserError(
                f":{name} cannot change here: type :quit, and start the command with --{name}"
            )
        else:
            raise UserError(f"no setting ':{name}'{nearest(name, COMMANDS)}; see :help")

    @property
    def _loaded(self) -> Any:
        if self._pipeline is None:
            self._pipeline = self._load(self._choice, self._settings)
        return self._pipeline

    def _size(self, value: str) -> None:
        found = re.fullmatch(r"([0-9]{1,9})\s*x\s*([0-9]{1,9})", value)
        if value and not found:
            raise UserError(f"the size must be like 192x128 (width x height), not '{value[:40]}'")
        width, height = (int(found[1]), int(found[2])) if found else (None, None)
        self._change(width=width, height=height)

    def _set(self, setting: Setting, value: str) -> None:
        if setting.dest in ("loras", "model", "output", "base", "stepwise_dir"):
            value = os.path.expanduser(value)
        if setting.values == SWITCH:
            args = argparse.Namespace()
            if value:
                if value not in SWITCH:
                    raise UserError(f"{setting.option} takes on or off, not '{value[:40]}'")
                setattr(args, setting.dest, value == "on")
        else:
            try:
                args = build_parser().parse_args(self._words(setting, value) if value else [])
            except OSError as error:
                raise UserError(f"cannot use {value[:80]}: {error.strerror}") from None
        if hasattr(self._saving, setting.dest):
            given = getattr(args, setting.dest, getattr(Saving(), setting.dest))
            self._saving = dataclasses.replace(self._saving, **{setting.dest: given})
        elif hasattr(self._settings, setting.dest):
            names = [setting.dest]
            if setting.dest == "image":
                # Without a picture, it has neither strength nor mask.
                names += ["strength"] if value else ["strength", "mask"]
            self._change(**{name: getattr(draw_settings(args), name) for name in names})
        else:
            self._choose(setting, model_choice(args))

    def _change(self, **values: Any) -> None:
        """Change settings, unless the loaded model cannot draw with a new value."""
        changed = dataclasses.replace(self._settings, **values)
        if (config := getattr(self._pipeline, "config", None)) is not None:
            fault = _fault(changed, config)
            if fault is not None and fault != _fault(self._settings, config):
                raise UserError(fault)
        self._settings = changed

    def _choose(self, setting: Setting, given: ModelChoice) -> None:
        """Load the model with another value of one field of its choice."""
        before, value = self._choice, getattr(given, setting.dest)
        self._choice = dataclasses.replace(before, **{setting.dest: value})
        is_file = str(given.model).endswith(".safetensors")
        if setting.dest == "model" and (given.base is not None or not is_file):
            # Only another file keeps the base, and the revision, which is of the base then.
            self._choice = dataclasses.replace(self._choice, revision=None, base=given.base)
        self._pipeline = None
        try:
            self._pipeline = self._load(self._choice, self._settings)
        except UserError:
            # The next prompt loads the previous model again.
            self._choice = before
            raise

    def _words(self, setting: Setting, value: str) -> list[str]:
        """The arguments of the command that stand for a line's value."""
        if setting.dest == "strength":
            if self._settings.image is None:
                raise UserError("choose the picture first, such as :image photo.jpg 0.6")
            return ["--image", str(self._settings.image), value]
        if setting.dest in ("image", "mask", "edit"):
            try:
                # As the shell does, also what a terminal inserts for a file dropped on it.
                words = shlex.split(value)
            except ValueError as error:
                raise UserError(f"cannot read {value[:80]}: {error}") from None
            if "last" in words and self._last is None:
                raise UserError("no picture was drawn yet: give a file")
            return [setting.option, *(str(self._last) if w == "last" else w for w in words)]
        file, found, base = value.partition(".safetensors ")
        if setting.dest == "model" and found:
            return [f"--model={file}{found.strip()}", f"--base={base.strip()}"]
        if setting.dest == "loras":
            return _lora_words(value.split())
        # A negative prompt is one argument, also if it starts with a dash.
        return [f"{setting.option}={value}"]


def _lora_words(words: Sequence[str]) -> list[str]:
    """Files, each perhaps with a scale, as options."""
    found: list[str] = []
    for i, word in enumerate(words):
        is_scale = i > 0 and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", word)
        found += [word] if is_scale else ["--lora", word]
    return found


def _fault(settings: DrawSettings, config: Description) -> str | None:
    """Why a model does not draw with settings; None if it does."""
    try:
        settings.resolved(config)
    except UserError as error:
        return str(error)
    return None


def as_typed(dest: str, value: Any) -> Any:
    """A value as it is typed."""
    if value in (None, "", ()):
        return "default"
    if isinstance(value, bool):
        return SWITCH[not value]
    if dest == "quantize":
        return value or "none"
    if dest == "loras":
        return " ".join(f"{file} {scale:g}" for file, scale in value)
    if dest == "text_encoders":
        return ",".join(value)
    if dest in ("image", "mask", "edit"):
        return shlex.join(map(str, value if dest == "edit" else [value]))
    return value


OPTIONS = {option.removeprefix("--"): name for name, (option, *_) in reversed(SETTINGS.items())}
"""Name of an option -> name of the setting."""


def as_settings(text: str) -> str:
    """A message of the command with the settings of the loop instead of options."""

    def setting(found: re.Match[str]) -> str:
        name = OPTIONS.get(found[2], found[2])
        if found[1] or name not in COMMANDS:
            return found[0]
        switch = name in SETTINGS and SETTINGS[name].values == SWITCH
        takes = text[found.end() :].startswith(" takes ")
        return f":{name} on" if switch and not takes else f":{name}"

    return re.sub(r"(convert\.\w+ )?(?<![\w-])--([a-z][a-z-]*)", setting, text)


def history_path() -> Path:
    """File of the input history."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mlx_snapgen" / "prompts"


@contextlib.contextmanager
def _line_editing(complete: Callable[[str, str], list[str]]):
    """Arrow keys, history and completion, with readline on a terminal."""
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = history_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LENGTH)
    terminal = readline

    def completer(text: str, state: int) -> str | None:
        before = terminal.get_line_buffer()[: terminal.get_begidx()]
        found = complete(text, before)
        return found[state] + " " if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(completer)
    # macOS has libedit under the same name, with another syntax.
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with contextlib.suppress(OSError):
            readline.write_history_file(path)
