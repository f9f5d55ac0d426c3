"""Draw a picture with exported packages in numpy: slow, but it runs on any machine.

    python -m convert.coreml.compare my-model-coreml "a red apple" --model my-model

The command writes picture.png. With --model it also draws the picture with MLX, and prints the PSNR
between the two. Below 35 dB the command fails: the packages are wrong, or come from another model.
There is no such limit if the packages have palettes and the model has none.

    python -m convert.coreml.compare my-model-coreml "a red apple" --model my-model --one-step

With --one-step the command runs only the transformer, once, on noise at noise level 0.5. It prints
the difference between this velocity and MLX's. The limits are 60 dB in float16, and 1e-4 of the
largest value in float32. Use --one-step for large models, and for models whose decoder or text
encoders are not exported.
"""

import argparse
from pathlib import Path

from PIL import Image

from convert.coreml.packages import (
    Packages,
    check_picture,
    check_step,
    compare_picture,
    compare_step,
    read_report,
)
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import MODEL_HELP, Parser, integer, new_png
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.quantize.palettes import load_palettes
from mlx_snapgen.settings import MAX_STEPS, WIDTH_NAMES


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m convert.coreml.compare",
        description=__doc__,
        renamed={"--function": "--model-width", "--compare": "--model"},
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="output folder of convert.coreml"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="description of the picture, in quotes")
    parser.add_argument(
        "-o",
        "--output",
        type=new_png,
        default=Path("picture.png"),
        metavar="PATH",
        help="picture to write, a .png file (default: picture.png)",
    )
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="seed of the noise (default: 0)"
    )
    parser.add_argument(
        "--steps",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="denoising steps (default: the model's)",
    )
    parser.add_argument(
        "--model-width",
        choices=WIDTH_NAMES,
        metavar="NAME",
        help="network width to run, if the packages have several (default: the first of them)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help=f"compare with the exported {MODEL_HELP} (default: no comparison)",
    )
    parser.add_argument(
        "--one-step",
        action="store_true",
        help="compare one velocity and write no picture (default: off)",
    )
    return parser


def _draw(packages: Packages, args: argparse.Namespace) -> Image.Image:
    with announce("drawing with the packages in numpy ..."):
        return packages.draw(args.prompt, args.seed, args.steps)


def main() -> None:
    args = make_parser().parse_args()
    if args.one_step and args.model is None:
        raise UserError("--one-step compares with a model: add --model MODEL")
    if not args.prompt.strip():
        raise UserError("the prompt is empty: write what to generate")
    packages = Packages(args.folder, args.model_width)
    if args.model is None:
        print(save_picture(_draw(packages, args), args.output))
        return
    width, precision, palettes = read_report(args.folder)
    width, model = args.model_width or width, ModelFolder.open(args.model).path
    is_exact = not palettes or load_palettes(model) is not None
    same = {"width": width, "prompt": args.prompt, "seed": args.seed}
    if args.one_step:
        ratio, difference = compare_step(packages, model, **same)
        print(f"velocity: {ratio:.1f} dB against MLX, {difference:.1e} of the largest value")
        if is_exact:
            check_step(ratio, difference, precision=precision)
        return
    picture = _draw(packages, args)
    print(save_picture(picture, args.output))
    ratio = compare_picture(packages, picture, model, num_inference_steps=args.steps, **same)
    print(f"{ratio:.1f} dB against MLX")
    if is_exact:
        check_picture(ratio)


if __name__ == "__main__":
    run_command(main)
