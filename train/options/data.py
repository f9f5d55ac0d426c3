"""Options that choose the pictures to train on."""

import argparse
import re

from mlx_snapgen.cli.options import finite_number, integer, option_of
from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size
from mlx_snapgen.settings import BYTES_PER_PIXEL, check_pixels, multiples_near
from train.data.open import PICTURES, SOURCES
from train.data.readers.folder import check_template
from train.data.selection import HELD_OUT, Filter, parse_captions
from train.options.common import add_number, check_outside

MOST_SIDE = 2**14


def add_data(
    parser: argparse.ArgumentParser,
    *,
    required: bool = True,
    resolution: str = "the model's",
    prepared: bool = True,
) -> None:
    """Options that choose the data; checked by `check_data`.

    Args:
        resolution: what `--resolution` means by default.
        prepared: whether the command takes folders of train.prepare.
    """
    sources = SOURCES if prepared else PICTURES
    group = parser.add_argument_group("data")
    add = group.add_argument
    add(
        "--data",
        nargs="+",
        action="extend",
        required=required,
        metavar="SOURCE",
        help=f"pictures: {sources}",
    )
    add(
        "--weights",
        nargs="+",
        action="extend",
        type=finite_number,
        metavar="W",
        help="share of the batches of each SOURCE, in any unit (default: in proportion to the "
        "number of pictures)",
    )
    add_resolution(group, default=resolution)
    add_selection(group)


def add_resolution(group: argparse._ActionsContainer, *, default: str = "the model's") -> None:
    """`--resolution`."""
    group.add_argument(
        "--resolution",
        type=integer(1, MOST_SIDE),
        metavar="PX",
        help="pixels per side of a square picture; other shapes have about as many pixels "
        f"(default: {default})",
    )


def add_selection(group: argparse._ActionsContainer, *, weights: bool = True) -> None:
    """The options that choose captions and leave out pictures; checked by `filter_from`.

    Args:
        weights: whether `--captions` takes weights.
    """
    add_captions(group, weights=weights)
    add = group.add_argument
    add_number(group, "--min-side", 1, "shortest side of a picture, in pixels")
    add_number(group, "--max-aspect", 4.0, "largest ratio of a picture's sides")
    add_number(group, "--min-caption", 1, "shortest caption, in characters")
    add(
        "--max-caption",
        type=integer(1, 10**9),
        metavar="N",
        help="longest caption, in characters (default: no limit)",
    )
    add_number(
        group,
        "--held-out",
        HELD_OUT,
        "share of the pictures to keep for validation; sets of fewer than 100 pictures keep none",
    )


def add_captions(group: argparse._ActionsContainer, *, weights: bool) -> None:
    """`--captions`, which may take weights, and `--caption-template`."""
    add = group.add_argument
    how = "with weights to choose one for each sample at random" if weights else "one or more"
    add(
        "--captions",
        nargs="+",
        action="extend",
        metavar="COLUMN[=W]" if weights else "COLUMN",
        help=f"columns of captions, {how} (default: text or caption, or else the first)",
    )
    add_caption_template(group)


def add_caption_template(group: argparse._ActionsContainer) -> None:
    """`--caption-template`; checked by `check_template`."""
    group.add_argument(
        "--caption-template",
        metavar="TEXT",
        help="caption of pictures in a folder that have none, with {} for the name of their "
        "folder, such as 'a photo of a {}' (default: leave them out)",
    )


def check_captions(args: argparse.Namespace) -> None:
    """`UserError` for invalid values of the options of `add_captions` without weights."""
    check_template(args.caption_template)
    parse_captions(args.captions or ())  # a column twice
    if weighted := [text for text in args.captions or () if "=" in text]:
        raise UserError(f"--captions {weighted[0]}: give the columns here, weights in training")


def filter_from(args: argparse.Namespace) -> Filter:
    """The filter that the options of `add_selection` describe.

    Raises:
        UserError: a value out of range.
    """
    if args.max_aspect < 1:
        raise UserError(f"--max-aspect must be at least 1, got {args.max_aspect:g}")
    for name in ("min_side", "min_caption"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"{option_of(name)} must be at least 1, got {value}")
    if args.max_caption is not None and args.max_caption < args.min_caption:
        raise UserError(f"--max-caption {args.max_caption} is below --min-caption")
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out must be at least 0 and below 1, got {args.held_out:g}")
    return Filter(args.min_side, args.max_aspect, args.min_caption, args.max_caption)


def check_data(
    args: argparse.Namespace, *, unit: int, bytes_per_pixel: float = BYTES_PER_PIXEL
) -> None:
    """`UserError` for invalid values of the options of `add_data`.

    Args:
        unit: sides of pictures are multiples of this.
        bytes_per_pixel: that the command needs at least.
    """
    filter_from(args)
    parse_captions(args.captions or ())
    for name in ("run_dir", "output"):
        if (path := getattr(args, name, None)) is not None:
            check_outside(option_of(name), path, sources=args.data or ())
    if args.weights is not None:
        if len(args.weights) != len(args.data or ()):
            given, wanted = len(args.weights), len(args.data or ())
            raise UserError(f"--weights: {given} numbers for {wanted} SOURCEs; give one for each")
        if min(args.weights) <= 0:
            raise UserError("--weights must be above 0")
    if args.resolution is not None:
        check_resolution(args.resolution, unit)
        check_pixels(args.resolution, args.resolution, bytes_per_pixel)


def check_resolution(side: int, unit: int) -> None:
    """`UserError` for a `--resolution` that is no multiple of `unit` pixels."""
    if side % unit:
        near = multiples_near(side, unit)
        raise UserError(f"--resolution {side}: give a multiple of {unit} pixels, such as {near}")


def size_pair(text: str) -> Size:
    """(height, width) in pixels of a text such as 256x384."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size such as 256x384 expected, not '{text}'")
    return int(match[1]), int(match[2])
