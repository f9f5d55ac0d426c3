"""The settings and options of `convert.coreml`, and their checks."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.options import add_output
from mlx_snapgen.cli.options import MODEL_HELP, Parser, integer
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.quantize.palettes import Palettes
from mlx_snapgen.settings import WIDTH_NAMES

TARGETS = ("ios17", "ios18")
PRECISIONS = ("float16", "float32")


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export."""

    widths: tuple[str, ...] = ("full",)
    """Network widths; several become functions of these names in one package, the first its
    default."""
    target: str = "ios17"
    """Oldest system that runs the packages, one of `TARGETS`."""
    precision: str = "float16"
    """One of `PRECISIONS`, of weights and arithmetic; the angles of the timestep stay float32."""
    quantize: float | None = None
    """Bits of the transformer's weights on average, 4 to 8 (see `Palettes`); None for no palettes.
    The other networks, a small part of a model, are never quantized."""
    chunks: int = 1
    """Packages to cut the transformer into."""
    prompts: Sequence[str] | None = None
    """Calibration prompts for new palettes; None takes prompts of the model's vocabulary."""

    def check(self) -> None:
        """`UserError` for settings that Core ML does not support together."""
        if len(set(self.widths)) < len(self.widths):
            raise UserError(f"a width is named twice: {' '.join(self.widths)}")
        if len(self.widths) > 1 and self.target == "ios17":
            raise UserError("several widths in one package need iOS 18: add --target ios18")
        if self.quantize is not None and self.precision != "float16":
            raise UserError("palettes are of float16: leave out --precision or --quantize")
        if self.quantize is not None and not 4 <= self.quantize <= 8:
            raise UserError(f"--quantize takes 4 to 8 bits, or none, not {self.quantize:g}")


def parse_resolution(text: str) -> tuple[int, int]:
    """Pixels of "512" or "512x768" (height x width); `UserError` for anything else."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise UserError(f"a resolution is 512 or 512x768 (height x width), not '{text}'")
    return int(match[1]), int(match[2] or match[1])


def parse_bits(text: str | None, palettes: Palettes | None) -> float | None:
    """Bits that --quantize names, by default those of the model's palettes; None for none.

    Raises:
        UserError: not a number, or not the bits of the model's palettes.
    """
    if text is None:
        return palettes and palettes.average_bits
    try:
        bits = None if text in ("0", "none") else float(text)
    except ValueError:
        raise UserError(f"--quantize takes 4 to 8 bits, or none, not '{text}'") from None
    if palettes and bits not in (None, palettes.average_bits):
        raise UserError(
            f"the model has palettes of {palettes.average_bits:g} bits on average, not {bits:g}: "
            "leave out --quantize, or export the model that train.palettes started from"
        )
    return bits


def check_palettes_fit(
    palettes: Palettes,
    config: ModelConfig,
    *,
    widths: Sequence[str],
    prompts: Sequence[str] | None,
) -> None:
    """`UserError` for settings that contradict the palettes of a model that has some."""
    if prompts:
        raise UserError("the model has palettes already: leave out --prompts-file")
    other = [width for width in widths if width not in palettes.widths]
    # In a model of one width, every name means this width.
    if other and config.transformer.widths != (1.0,):
        raise UserError(
            f"the palettes are for {' and '.join(palettes.widths)}, not {other[0]}: export these, "
            "or run train.palettes with other widths"
        )


class _Resolution(argparse.Action):
    """--resolution 512 or 512x768, now --height and --width."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print("warning: --resolution is now --height and --width", file=sys.stderr)
        namespace.height, namespace.width = parse_resolution(values)


def make_parser(description: str | None) -> Parser:
    parser = Parser(
        prog="python -m convert.coreml",
        description=description,
        renamed={
            "--width": "--model-width",
            "--widths": "--model-widths",
            "--prompts": "--prompts-file",
        },
        only={"--width": WIDTH_NAMES},
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_output(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--model-width",
        dest="widths",
        choices=WIDTH_NAMES,
        nargs=1,
        default=["full"],
        metavar="NAME",
        help="network width to export: full, small (1/2) or tiny (3/8) (default: full)",
    )
    chosen.add_argument(
        "--model-widths",
        dest="widths",
        choices=WIDTH_NAMES,
        nargs="+",
        default=["full"],
        metavar="NAME",
        help="export several network widths in one package; needs --target ios18 (default: full)",
    )
    size = "of the picture in pixels (default: the model's)"
    parser.add_argument("--height", type=integer(1), metavar="PX", help=f"height {size}")
    parser.add_argument("--width", type=integer(1), metavar="PX", help=f"width {size}")
    parser.add_argument("--resolution", action=_Resolution, help=argparse.SUPPRESS)
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="ios17",
        help="oldest iOS version that runs the packages (default: ios17)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float16",
        help="type of weights and arithmetic (default: float16)",
    )
    parser.add_argument(
        "--quantize",
        metavar="BITS",
        help="average bits per weight of the transformer, 4 to 8, such as 4.3, or none "
        "for no palettes (default: those of train.palettes if the model has them, otherwise none)",
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="file of calibration prompts for --quantize, one per line (default: captions from "
        "the model's vocabulary)",
    )
    parser.add_argument(
        "--chunks",
        type=integer(1),
        default=1,
        metavar="N",
        help="number of packages for the transformer (default: 1)",
    )
    parser.add_argument(
        "--no-few-step",
        action="store_true",
        help="do not merge the model's few-step LoRA: the export then needs more steps "
        "(default: off)",
    )
    return parser
