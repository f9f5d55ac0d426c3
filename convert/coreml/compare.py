"""Generate a picture with exported packages, on any machine: slow, in numpy.

    python -m convert.coreml.compare my-model-coreml "a red apple" --model my-model

writes picture.png and, with --model, prints its PSNR against the picture of the MLX model. Below
35 dB the command fails: the packages were exported from another model, or are wrong. Packages with
palettes that the model does not have are measured too, without a limit.

    python -m convert.coreml.compare my-model-coreml "a red apple" --model my-model --one-step

runs the transformer's packages once, on noise at noise level 0.5, and prints how far their velocity
is from MLX's. The limits are 60 dB in float16, and 1e-4 of the largest value in float32. Use it for
large models, and for models of which only the transformer is exported.
"""

from pathlib import Path

from convert.coreml.packages import (
    Packages,
    check_picture,
    check_step,
    compare_picture,
    compare_step,
    read_report,
)
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.metadata import save_picture
from mlx_snapgen.quantize.palettes import load_palettes
from mlx_snapgen.settings import WIDTH_NAMES


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m convert.coreml.compare",
        description=__doc__,
        renamed={"--function": "--model-width", "--compare": "--model"},
    )
    parser.add_argument("folder", type=Path, help="output folder of convert.coreml")
    parser.add_argument("prompt", help="what to generate, in quotes")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("picture.png"),
        metavar="PATH",
        help="picture to write, a .png file (default: picture.png)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the noise (default: 0)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the model's)"
    )
    parser.add_argument(
        "--model-width",
        choices=WIDTH_NAMES,
        help="network width to run, for packages of several widths (default: the packages' first)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the exported model, to compare with: stickers, or folder or Hugging Face repository "
        "(default: no comparison)",
    )
    parser.add_argument(
        "--one-step", action="store_true", help="compare one velocity and write no picture"
    )
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.one_step and args.model is None:
        raise UserError("--one-step compares with a model: add --model MODEL")
    if not args.prompt.strip():
        raise UserError("the prompt is empty: write what to generate")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps must be a positive number, got {args.steps}")
    packages = Packages(args.folder, args.model_width)
    if args.model is None:
        print(save_picture(packages.draw(args.prompt, args.seed, args.steps), args.output))
        return
    width, precision, palettes = read_report(args.folder)
    width, model = args.model_width or width, find_model(args.model)
    is_exact = not palettes or load_palettes(model) is not None
    same = {"width": width, "prompt": args.prompt, "seed": args.seed}
    if args.one_step:
        ratio, difference = compare_step(packages, model, **same)
        print(f"velocity: {ratio:.1f} dB against MLX, {difference:.1e} of the largest value")
        if is_exact:
            check_step(ratio, difference, precision=precision)
        return
    picture = packages.draw(args.prompt, args.seed, args.steps)
    print(save_picture(picture, args.output))
    ratio = compare_picture(packages, picture, model, num_inference_steps=args.steps, **same)
    print(f"{ratio:.1f} dB against MLX")
    if is_exact:
        check_picture(ratio)


if __name__ == "__main__":
    run_command(main)
