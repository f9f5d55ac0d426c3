"""Options: what all commands share, and those of `python -m mlx_snapgen.generate`."""

import argparse
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.settings import MAX_SEED, MAX_STEPS, WIDTH_NAMES

EXAMPLES = """
examples:
  python -m mlx_snapgen.generate "a red apple to the left of a blue car"
  python -m mlx_snapgen.generate "three cats" --num-images 4 --seed 7 --output cats/
  python -m mlx_snapgen.generate "a purple car" --model-width tiny --steps 12 --guidance 3
  python -m mlx_snapgen.generate "two owls" --negative-prompt "a yellow background"
  python -m mlx_snapgen.generate "a purple car" --lora crayons.safetensors 0.8
  python -m mlx_snapgen.generate --config-from-image a-purple-car.png --steps 40
  python -m mlx_snapgen.generate --prompts-file prompts.txt --output pictures/ --json
  python -m mlx_snapgen.generate --interactive --model-width tiny

--width and --height are the picture's, in pixels; --model-width is the share of the network that
draws it. A picture that exists is never overwritten: the next is called name-1.png. Mistakes exit
with code 2 and one line that says what to do.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser of this project: errors are one line, and old names of options still work.

    Args:
        renamed: old name of an option -> its name now. The old one works and prints a warning.
        only: old name -> the values that it is renamed with, where the old name has another
            meaning otherwise.
    """

    def __init__(
        self,
        *args: Any,
        renamed: Mapping[str, str] | None = None,
        only: Mapping[str, Collection[str]] | None = None,
        **kwargs: Any,
    ):
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.renamed, self.only = dict(renamed or {}), dict(only or {})

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(given):
            old, equals, value = word.partition("=")
            if old not in self.renamed:
                continue
            value = value if equals else next(iter(given[i + 1 :]), "")
            if old in self.only and value not in self.only[old]:
                continue
            print(f"warning: {old} is now {self.renamed[old]}", file=sys.stderr)
            given[i] = self.renamed[old] + word[len(old) :]
        return super().parse_known_args(given, namespace)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            first = message.split()[2]
            if first.startswith("-"):
                message = f"unknown option {first}{nearest(first, self._option_string_actions)}"
            else:
                message = f"unexpected '{first}': put the whole prompt in quotes"
        raise UserError(f"{message}; see --help")


def add_model(parser: argparse._ActionsContainer, *, default: str | None = "stickers") -> None:
    """`--model`, for `checkpoint.hub.find_model`; required without a default."""
    known = "folder, Hugging Face repository, or stickers for the built-in one"
    parser.add_argument(
        "--model",
        default=default,
        required=default is None,
        metavar="MODEL",
        help=f"model: {known}" + (f" (default: {default})" if default else ""),
    )


def add_model_widths(parser: argparse._ActionsContainer, *, default: Sequence[str] | None) -> None:
    """`--model-widths`; None means all that the model has."""
    shown = "all that the model has" if default is None else " ".join(default)
    parser.add_argument(
        "--model-widths",
        nargs="+",
        choices=WIDTH_NAMES,
        default=default,
        metavar="NAME",
        help=f"network widths, of {', '.join(WIDTH_NAMES)} (default: {shown})",
    )


class _LoRAs(argparse.Action):
    """`--lora PATH [SCALE]`, any number of times -> [(path, scale), ...]."""

    def __call__(self, parser, namespace, values, option_string=None):
        path, *scales = values
        try:
            if len(scales) > 1:
                raise argparse.ArgumentTypeError(f"'{scales[1]}' follows a file and its scale")
            pair = path, _finite(scales[0]) if scales else 1.0
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"{error} (prompts go before it)") from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), pair])


def _pixels(text: str) -> int:
    if text in WIDTH_NAMES:
        raise argparse.ArgumentTypeError(
            f"takes pixels; to choose the network's width use --model-width {text}"
        )
    return _whole_number(1)(text)


def _model_width(text: str) -> str:
    if text not in WIDTH_NAMES:
        hint = "; the picture's width in pixels is --width" if text.isdigit() else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not full, small or tiny{hint}")
    return text


def _whole_number(least: int, most: int = MAX_SEED):
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number expected, not '{text}'") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{number} is not between {least} and {most}")
        return number

    return parse


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number expected, not '{text}'") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError("a finite number expected")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command's options. All default to None where a picture or the model may know better."""
    parser = Parser(
        prog="python -m mlx_snapgen.generate",
        description="Draw pictures from a sentence.",
        epilog=EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    picture = parser.add_argument_group("picture")
    add = picture.add_argument
    add("--negative-prompt", metavar="TEXT", help="what to keep out (not at --guidance 1)")
    add("--height", type=_pixels, metavar="PX", help="pixels (default: the model's own size)")
    add("--width", type=_pixels, metavar="PX", help="pixels; for the network see --model-width")
    add("--seed", type=_whole_number(0), help="start of the noise (default: random, then printed)")
    add(
        "--num-images", type=_whole_number(1), default=1, metavar="N", help="seeds SEED .. SEED+N-1"
    )
    add(
        "--steps",
        dest="num_inference_steps",
        type=_whole_number(1, MAX_STEPS),
        metavar="N",
        help="denoising steps; fewer is faster and rougher (default: the model's)",
    )
    add(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the model's few-step mode, if it has one (default: up to twice its own steps)",
    )
    add(
        "--guidance",
        dest="guidance_scale",
        type=_finite,
        metavar="G",
        help="how hard to follow the prompt; 1 is off and twice as fast (default: the model's)",
    )
    add(
        "--attention-modulation",
        action=argparse.BooleanOptionalAction,
        help="let some blocks look harder at what is near them, as EDT does (default: no)",
    )
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", metavar="M", help="folder or Hugging Face repository (default: stickers)")
    add("--revision", metavar="R", help="branch, tag or commit of the repository")
    add(
        "--model-width",
        type=_model_width,
        metavar="W",
        help="share of the network to use: full, small (1/2) or tiny (3/8) (default: full)",
    )
    add(
        "--quantize",
        type=int,
        choices=(0, 4, 8),
        help="bits per weight in memory; 0 is off (default). Saves memory on a GPU; the CPU only "
        "shows what it does to pictures",
    )
    add(
        "--lora",
        dest="loras",
        action=_LoRAs,
        nargs="+",
        metavar=("PATH", "SCALE"),
        help="a .safetensors LoRA file and how strongly to apply it (default: 1); may be repeated",
    )
    add(
        "--text-encoders",
        type=lambda names: [name.strip() for name in names.split(",")],
        metavar="NAMES",
        help="use only these of the model's text encoders, such as clip or gemma (default: all)",
    )
    add(
        "--keep-text-encoders",
        action="store_true",
        help="keep them in memory while drawing: more memory, faster with several prompts",
    )
    add(
        "-i",
        "--interactive",
        action="store_true",
        help="keep the model loaded and ask for one prompt after the other (:help lists settings)",
    )
    add("--vocabulary", action="store_true", help="print the words the model knows and exit")
    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="a .png file, or a folder (ending in /); missing folders are made (default: named "
        "after the prompt, here)",
    )
    add("--prompts-file", metavar="FILE", help="a prompt per line, # for comments, - for stdin")
    add(
        "--config-from-image",
        metavar="PNG",
        help="draw the picture again from what it knows of itself; options given here win",
    )
    add(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep prompt and settings inside the picture (default: yes)",
    )
    add("--stepwise-dir", metavar="DIR", help="also save what each step expects to see at the end")
    add("--json", action="store_true", help="print one JSON object per picture, and nothing else")
    return parser
