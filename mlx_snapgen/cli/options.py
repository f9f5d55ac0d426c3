"""Options that several commands share, and their parser."""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.files import check_writable, expanded
from mlx_snapgen.fitting import FITS
from mlx_snapgen.picture_files import picture_size
from mlx_snapgen.settings import (
    BUILT_IN,
    MAX_SEED,
    MAX_STEPS,
    WIDTH_NAMES,
    DrawSettings,
    ModelChoice,
)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors in one line and accepts old names of options.

    Args:
        renamed: old name of an option -> its current name. The old name works and prints a warning.
        only: old name -> the values with which it is the renamed option; with other values it is an
            option that has this name today.
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
        for i, word in enumerate(given):
            name, _, value = word.partition("=")
            if name.startswith("--") and value == "--":  # argparse would leave it out
                self.error(f"argument {name}: '--' is not a value")
            # The shell does so only where the value is a word of its own.
            if name.startswith("--") and (value == "~" or value.startswith("~/")):
                given[i] = f"{name}={os.path.expanduser(value)}"
        found, rest = super().parse_known_args(given, namespace)
        for name, value in vars(found).items():
            if isinstance(value, Path):
                setattr(found, name, expanded(value))
        return found, rest

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            first = message.split()[2]
            if first.startswith("-"):
                hint = nearest(first, self._option_string_actions, cutoff=0.6)
                message = f"unknown option {first}{hint}"
            elif re.fullmatch(r"[0-9]*\.?[0-9]+", first):
                message = f"unexpected '{first}': a number goes right after its option or file"
            elif any(a.dest == "prompt" and not a.option_strings for a in self._actions):
                message = f"unexpected '{first}': put the whole prompt in quotes"
            else:
                message = f"unexpected '{first}'"
        raise UserError(f"{message}; see --help")


MODEL_HELP = f"model: folder, Hugging Face repository, or {BUILT_IN} for the built-in one"
BASE_HELP = (
    "of one .safetensors file with a transformer, such as ComfyUI's: the model whose text encoder, "
    "autoencoder and settings it uses, a folder in diffusers' format or a Hugging Face repository "
    "(default: none)"
)


def add_model(
    parser: argparse._ActionsContainer, *, default: str | None = BUILT_IN, several: bool = False
) -> None:
    """`--model`, for `checkpoint.hub.find_model`; required without a default."""
    more = "; several may be given, the first is the default one" if several else ""
    parser.add_argument(
        "--model",
        action="extend" if several else "store",
        nargs="+" if several else None,
        default=default,
        required=default is None,
        metavar="MODEL",
        help=MODEL_HELP + more + (f" (default: {default})" if default else ""),
    )


def add_model_widths(
    parser: argparse._ActionsContainer, *, default: Sequence[str] | None, more: str = ""
) -> None:
    """`--model-widths`; None means all that the model has. The help ends with `more`."""
    shown = "all that the model has" if default is None else " ".join(default)
    parser.add_argument(
        "--model-widths",
        nargs="+",
        choices=WIDTH_NAMES,
        default=default,
        metavar="NAME",
        help=f"network widths, one or more of full, small (1/2) and tiny (3/8){more} "
        f"(default: {shown})",
    )


def add_model_source(
    parser: argparse._ActionsContainer, *, quantize: str, several: bool = False
) -> None:
    """`--revision`, `--base` and `--quantize`, whose help starts with `quantize`."""
    add = parser.add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a repository (default: main)")
    more = "; one for all such files, or one for each of them in their order" if several else ""
    add(
        "--base",
        action="extend" if several else "store",
        nargs="+" if several else None,
        metavar="MODEL",
        help=BASE_HELP.replace(" (default", more + " (default"),
    )
    add(
        "--quantize",
        type=bits(4, 8),
        metavar="BITS",
        help=f"{quantize} (default: none; of a public model: by the machine's memory)",
    )


def add_model_choice(parser: argparse._ActionsContainer, *, several: bool = False) -> None:
    """The fields of `settings.ModelChoice` except the width; None if an option was not given.

    With `several`, `model` and `base` are lists.
    """
    add_model(parser, several=several)
    parser.set_defaults(model=None)
    add_model_source(
        parser,
        quantize="quantize to 4 or 8 bits per weight, or none: the transformer in memory, or, of a "
        "public model, transformer and text encoder in the cache",
        several=several,
    )
    add = parser.add_argument
    add(
        "--lora",
        dest="loras",
        action=_LoRAs,
        nargs="+",
        metavar=("PATH", "SCALE"),
        help="draw with the LoRA in this .safetensors file or folder; SCALE is its strength, 1 if "
        "not given; repeat the option for several (default: no LoRA)",
    )
    add(
        "--text-encoders",
        type=lambda names: tuple(name.strip() for name in names.split(",")),
        metavar="NAMES",
        help="load only these of the model's text encoders, such as clip,gemma (default: all)",
    )
    add(
        "--keep-text-encoders",
        action="store_true",
        help="keep the text encoders in memory while drawing: faster with several prompts, needs "
        "more memory (default: off)",
    )
    add(
        "--low-memory",
        action="store_true",
        help="free a public model's transformer before decoding and read it again for the next "
        "picture, and return freed memory to the system at once: slower (default: off)",
    )


def add_cache_limit(parser: argparse._ActionsContainer, *, default: str) -> None:
    """`--cache-limit`, as bytes; None if not given."""
    parser.add_argument(
        "--cache-limit",
        type=_gigabytes,
        metavar="GB",
        help="freed memory that MLX keeps for reuse, at most; 0 keeps none and is slower "
        f"(default: {default})",
    )


def _gigabytes(text: str) -> int:
    """Bytes."""
    number = finite_number(text)
    if not 0 <= number <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} GB is not between 0 and 1000000")
    return int(number * 1e9)


def add_steps_and_guidance(parser: argparse._ActionsContainer) -> None:
    """`num_inference_steps` and `guidance_scale` of `settings.DrawSettings`."""
    parser.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="denoising steps; fewer are faster and less accurate (default: the model's)",
    )
    parser.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=guidance_scale,
        metavar="G",
        help="classifier-free guidance scale; 1 is off and twice as fast (default: the model's)",
    )


def add_sampling(parser: argparse._ActionsContainer) -> None:
    """The fields of `settings.DrawSettings` that choose how to sample; None if not given."""
    add_steps_and_guidance(parser)
    parser.add_argument(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the model's few-step mode (default: on, unless --steps is more than twice the "
        "steps of this mode)",
    )
    parser.add_argument(
        "--attention-modulation",
        action=argparse.BooleanOptionalAction,
        help="use the attention modulation of the EDT paper: some blocks attend more to nearby "
        "parts of the picture (default: off)",
    )


def add_pictures(parser: argparse._ActionsContainer) -> None:
    """The fields of `settings.DrawSettings` that name pictures to start from; None if not given."""
    add = parser.add_argument
    add(
        "--image",
        action=_Image,
        nargs="+",
        metavar=("FILE", "STRENGTH"),
        help="picture to start from; STRENGTH is how much of it is redrawn, from above 0 (almost "
        "nothing) to 1 (everything), 0.6 if not given, with --mask 1 (default: none)",
    )
    parser.set_defaults(strength=None)
    add(
        "--mask",
        type=_picture,
        metavar="FILE",
        help="redraw only parts of --image: where this picture of the same size is transparent or, "
        "if it is nowhere transparent, white (default: everywhere)",
    )
    add(
        "--edit",
        nargs="+",
        type=_picture,
        action=_Pictures,
        metavar="FILE",
        help="pictures that the prompt is about, for FLUX.2 klein (default: none)",
    )
    add(
        "--fit",
        choices=FITS,
        help="how --image and --mask get another aspect ratio: crop cuts them, pad adds bars, "
        "white or transparent, stretch distorts them (default: crop)",
    )


def draw_settings(args: argparse.Namespace, base: DrawSettings | None = None) -> DrawSettings:
    """`base` with its fields replaced by the options that were given; None: a random seed."""
    base = base or DrawSettings(seed=None)
    return dataclasses.replace(base, **_given(base, args))


def model_choice(args: argparse.Namespace, base: ModelChoice | None = None) -> ModelChoice:
    """`base` with its fields replaced by the options that were given."""
    base = base or ModelChoice()
    return dataclasses.replace(base, **_given(base, args))


def _given(base: Any, args: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(args, name, None) for name in vars(base)}
    return {name: value for name, value in values.items() if value is not None}


class _Image(argparse.Action):
    """`--image FILE [STRENGTH]` -> `image` and `strength`."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        path, strength = _path_and_number(self, values, what="strength", default=None)
        try:
            _picture(path)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if strength is not None and not 0 < strength <= 1:
            raise argparse.ArgumentError(
                self, f"the strength must be above 0 and at most 1, not {strength:g}"
            )
        namespace.image, namespace.strength = path, strength


class _Pictures(argparse.Action):
    """`--edit FILE ...` -> a tuple."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *values))


class _LoRAs(argparse.Action):
    """`--lora PATH [SCALE]`, any number of times -> ((path, scale), ...)."""

    def __call__(self, parser, namespace, values: Any, option_string=None):
        pair = _path_and_number(self, values, what="scale", default=1.0)
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), pair))


def _path_and_number(
    action: argparse.Action, values: Sequence[str], *, what: str, default: float | None
) -> tuple[str, float | None]:
    """PATH [NUMBER]; `what` is the number."""
    path, *numbers = values
    try:
        if len(numbers) > 1:
            raise argparse.ArgumentTypeError(f"'{numbers[1]}' follows a file and its {what}")
        return path, finite_number(numbers[0]) if numbers else default
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentError(action, f"{error} (prompts go before it)") from None


def _picture(text: str) -> str:
    """The name of a file that is a picture."""
    try:
        picture_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


SHORTER = {"num_inference_steps": "steps", "guidance_scale": "guidance", "loras": "lora"}
"""Attribute of parsed arguments -> its option, if that has another name."""


def option_of(name: str) -> str:
    """The option of an attribute of parsed arguments: `--batch-size` of `batch_size`."""
    return f"--{SHORTER.get(name, name).replace('_', '-')}"


def bits(*known: int) -> Callable[[str], int]:
    """An argparse type: some of `known` bits per weight, or none, which is 0."""
    names = {"0": 0, "none": 0} | {str(number): number for number in known}

    def parse(text: str) -> int:
        if text not in names:
            choices = f"{', '.join(map(str, known))} or none"
            raise argparse.ArgumentTypeError(f"takes {choices}, not '{text}'")
        return names[text]

    return parse


def integer(least: int, most: int = MAX_SEED) -> Callable[[str], int]:
    """An argparse type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number expected, not '{text}'") from None
        if number < least and most == MAX_SEED:
            raise argparse.ArgumentTypeError(f"{number} is below {least}")
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{number} is not between {least} and {most}")
        return number

    return parse


def new_png(text: str) -> Path:
    """A type of options: the name of a picture to write."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"give a name ending in .png, not '{text}'")
    try:
        check_writable(path.parent)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def guidance_scale(text: str) -> float:
    """An argparse type: a finite number from 0."""
    if (number := finite_number(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def finite_number(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number expected, not '{text}'") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError("a finite number expected")
    return number
