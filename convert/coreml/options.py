"""The options of `convert.coreml`, and what does not go together among them."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from convert.coreml.package import PRECISIONS, TARGETS
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.quantize.palettes import Palettes
from mlx_snapgen.settings import WIDTH_NAMES


def check_options(
    widths: Sequence[str], target: str, precision: str, quantize: float | None
) -> None:
    """`UserError` for what Core ML does not do."""
    if len(set(widths)) < len(widths):
        raise UserError(f"a width is named twice: {' '.join(widths)}")
    if len(widths) > 1 and target == "ios17":
        raise UserError("several widths in one package take iOS 18: add --target ios18")
    if quantize is not None and precision != "float16":
        raise UserError("palettes are of float16: leave out --precision or --quantize")
    if quantize is not None and not 4 <= quantize <= 8:
        raise UserError(f"--quantize takes 4 to 8 bits on average or none, not {quantize:g}")


def parse_resolution(text: str) -> tuple[int, int]:
    """Pixels of "512" or "512x768" (height x width); `UserError` for anything else."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        raise UserError(f"a resolution is 512 or 512x768 (height x width), not '{text}'")
    return int(match[1]), int(match[2] or match[1])


def parse_bits(text: str | None, palettes: Palettes | None) -> float | None:
    """Bits of --quantize, those of the model's own palettes when it is not given; None for "none".

    Raises:
        UserError: no number, or not what the model's palettes have.
    """
    if text is None:
        return palettes and palettes.average_bits
    try:
        bits = None if text == "none" else float(text)
    except ValueError:
        raise UserError(f"--quantize takes 4 to 8 bits on average or none, not '{text}'") from None
    if palettes and bits not in (None, palettes.average_bits):
        raise UserError(
            f"the model has palettes of {palettes.average_bits:g} bits on average, not {bits:g}: "
            "leave out --quantize, or export the model that it was made of"
        )
    return bits


def check_palettes_fit(
    palettes: Palettes, config: ModelConfig, widths: Sequence[str], prompts: Sequence[str] | None
) -> None:
    """`UserError` for what does not go with palettes that the model has already."""
    if prompts:
        raise UserError("the model has its palettes: leave out --prompts")
    other = [width for width in widths if width not in palettes.widths]
    # A model of one width is that width, whatever it was called before.
    if other and config.transformer.widths != (1.0,):
        raise UserError(
            f"the palettes are for {' and '.join(palettes.widths)}, not {other[0]}: export these, "
            "or run train.palettes with the widths that you want"
        )


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty; `UserError` when there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"{path} has no prompts: write one on each line")
    return prompts


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert.coreml",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or repository of the model")
    parser.add_argument("output", type=Path, help="folder to write, not there yet")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--width", choices=WIDTH_NAMES, default="full", help="default: full")
    chosen.add_argument(
        "--widths", choices=WIDTH_NAMES, nargs="+", help="several in one package; takes iOS 18"
    )
    parser.add_argument(
        "--resolution", metavar="N", help="pixels, 512 or 512x768; default: its own"
    )
    parser.add_argument("--target", choices=TARGETS, default="ios17", help="default: ios17")
    parser.add_argument("--precision", choices=PRECISIONS, default="float16")
    parser.add_argument(
        "--quantize",
        metavar="BITS",
        help="4 to 8, of the transformer's weights on average, such as 4.3, or none; default: "
        "those that train.palettes gave the model, else none",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="to calibrate on, one on each line"
    )
    parser.add_argument(
        "--chunks", type=int, default=1, metavar="N", help="packages for the transformer"
    )
    parser.add_argument(
        "--no-few-step", action="store_true", help="leave the few-step LoRA out: many steps"
    )
    return parser
