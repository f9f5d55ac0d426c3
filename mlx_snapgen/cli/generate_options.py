"""The options of `python -m mlx_snapgen.generate`."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from mlx_snapgen.cli.options import (
    Parser,
    add_cache_limit,
    add_model_choice,
    add_pictures,
    add_sampling,
    integer,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_writable, expanded
from mlx_snapgen.settings import MAX_BATCH, WIDTH_NAMES, DrawSettings

EXAMPLES = """
examples:
  python -m mlx_snapgen.generate "a red apple to the left of a blue car"
  python -m mlx_snapgen.generate "three cats" --num-images 4 --seed 7 --output cats/
  python -m mlx_snapgen.generate "a purple car" --model-width tiny --steps 12 --guidance 3
  python -m mlx_snapgen.generate "two owls" --negative-prompt "a yellow background"
  python -m mlx_snapgen.generate "a purple car" --lora crayons.safetensors 0.8
  python -m mlx_snapgen.generate "a green car" --image a-purple-car.png 0.6
  python -m mlx_snapgen.generate "a green car" --image a-purple-car.png --mask car.png
  python -m mlx_snapgen.generate --config-from-image a-purple-car.png --steps 40
  python -m mlx_snapgen.generate --prompts-file prompts.txt --output pictures/ --json
  python -m mlx_snapgen.generate --interactive --model-width tiny
  python -m mlx_snapgen.generate "a red fox in snow" --model Tongyi-MAI/Z-Image-Turbo

--width and --height set the size of the picture in pixels. --model-width selects the size of the
network: a smaller network is faster and makes more mistakes. The command never overwrites a file:
if name.png exists, it writes name-1.png. An error is one line, with exit code 2.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's parser; an option that was not given is None.

    Destinations are fields of `DrawSettings` and `ModelChoice`; `draw_settings` and `model_choice`
    of `mlx_snapgen.cli.options` make these from the parsed options.
    """
    parser = Parser(
        prog="python -m mlx_snapgen.generate",
        description="Draw pictures from a text prompt.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="description of the picture, in quotes"
    )
    picture = parser.add_argument_group("picture")
    add = picture.add_argument
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="what to keep out of the picture; no effect at --guidance 1 (default: nothing)",
    )
    add("--height", type=_pixels, metavar="PX", help="height in pixels (default: the model's)")
    add("--width", type=_pixels, metavar="PX", help="width in pixels (default: the model's)")
    add(
        "--force-size",
        action="store_true",
        default=None,
        help="draw exactly this height and width, also if the model was not trained on it "
        "(default: off, the nearest size that it was trained on)",
    )
    add("--seed", type=integer(0), metavar="N", help="seed of the noise (default: random)")
    add(
        "--num-images",
        type=integer(1),
        default=1,
        metavar="N",
        help="number of pictures; each gets the next seed (default: 1)",
    )
    add(
        "--batch-size",
        type=integer(1, MAX_BATCH),
        metavar="N",
        help="number of pictures to draw at a time, also of several lines of --prompts-file; 1 "
        "draws one by one (default: up to 8 small ones, by the memory)",
    )
    add_sampling(picture)
    add_pictures(parser.add_argument_group("pictures to start from"))
    model = parser.add_argument_group("model")
    add_model_choice(model)
    add_cache_limit(model, default="MLX's own, or 0 with --low-memory")
    model.add_argument(
        "--model-width",
        type=_model_width,
        metavar="NAME",
        help="network width: full, small (1/2) or tiny (3/8) (default: full)",
    )
    add = parser.add_argument_group("input and output").add_argument
    add(
        "-i",
        "--interactive",
        action="store_true",
        help="keep the model loaded and read one prompt after another; :help lists the settings "
        "(default: off)",
    )
    add(
        "--prompts-file",
        metavar="FILE",
        help="draw each line of a UTF-8 text file, except lines that start with #; - reads the "
        "standard input (default: draw PROMPT)",
    )
    add(
        "--config-from-image",
        metavar="PNG",
        help="reuse the settings stored in this PNG; options on the command line override them "
        "(default: no PNG)",
    )
    add(
        "--trust-settings",
        action="store_true",
        help="with --config-from-image: also use the model, revision and LoRAs that the PNG names, "
        "and download the model if necessary (default: off)",
    )
    add(
        "--vocabulary",
        action="store_true",
        help="print the words that the model understands, and exit (default: off)",
    )
    add(
        "-o",
        "--output",
        type=_picture_path,
        metavar="PATH",
        help="a .png file, or a folder ending in /; missing folders are created (default: a file "
        "in the current folder, named after the prompt)",
    )
    add(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="store prompt and settings in the picture (default: on)",
    )
    add(
        "--stepwise-dir",
        type=_writable_folder,
        metavar="DIR",
        help="also save the estimate after each step in this folder (default: off)",
    )
    add(
        "--json",
        action="store_true",
        help="print one JSON object per picture and nothing else (default: off)",
    )
    return parser


@dataclass(frozen=True)
class Saving:
    """How pictures are saved; the fields are destinations of the parser."""

    output: str | None = None
    """File or folder; None is the current folder."""
    metadata: bool = True
    stepwise_dir: str | None = None
    json: bool = False


def check_together(args: argparse.Namespace, settings: DrawSettings) -> None:
    """`UserError` for an option that has no effect without another one.

    Args:
        settings: made of the options, and of the PNG of --config-from-image.
    """
    if args.trust_settings and args.config_from_image is None:
        raise UserError("--trust-settings is for --config-from-image: give a PNG, or leave it out")
    # In the prompt loop, the others may follow.
    if args.interactive:
        return
    for name in ("mask", "fit"):
        if getattr(args, name) is not None and settings.image is None:
            raise UserError(f"--{name} is for --image: give the picture to start from")
    if args.force_size and settings.height is None and settings.width is None:
        raise UserError("--force-size is for --height and --width: give one of them")


def is_folder(output: str) -> bool:
    """Whether an `--output` is a folder, not a file."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _pixels(text: str) -> int:
    if text in WIDTH_NAMES:
        raise argparse.ArgumentTypeError(
            f"takes pixels; to choose the network's width use --model-width {text}"
        )
    return integer(1)(text)


def _model_width(text: str) -> str:
    if text not in WIDTH_NAMES:
        hint = "; the picture's width in pixels is --width" if text.isdigit() else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not full, small or tiny{hint}")
    return text


def _picture_path(text: str) -> str:
    expanded(text)
    if is_folder(text):
        return _writable_folder(text)
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a name ending in .png nor a folder ending in /"
        )
    _writable_folder(str(Path(text).parent))
    expanded(text)
    return text


def _writable_folder(text: str) -> str:
    """The name of a folder that can be written to, or created."""
    try:
        check_writable(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
