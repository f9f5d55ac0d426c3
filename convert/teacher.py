"""Convert a public flow model to a teacher for `train.kd` and `train.kdmd`.

    python -m convert.teacher Qwen/Qwen-Image qwen-image --quantize 4
    python -m convert.teacher Tongyi-MAI/Z-Image-Turbo z-image
    python -m convert.teacher Qwen/Qwen-Image qwen-image --quantize 4 \\
        --few-step-lora Qwen-Image-Lightning-4steps-V1.0.safetensors

SOURCE is a folder in diffusers' format, or a Hugging Face repository. --quantize quantizes the
matrices of the transformer's blocks, tensor by tensor. --transformer takes the transformer from a
folder written by `convert.from_torch`, which can resume an interrupted conversion, instead of from
SOURCE.
"""

from pathlib import Path

from convert.options import add_output, parse
from convert.public.teachers import convert_teacher
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.language_models import QWEN_FILES
from mlx_snapgen.checkpoint.module import BITS, GROUP_SIZES
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import check_new


def main() -> None:
    parser = Parser(
        prog="python -m convert.teacher", description=__doc__, renamed={"--bits": "--quantize"}
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder in diffusers' format, or Hugging Face repository",
    )
    add_output(parser)
    parser.add_argument(
        "--quantize",
        type=int,
        choices=BITS,
        help="bits per weight of the transformer's blocks (default: not quantized)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=64,
        help="weights that share a scale when quantized (default: 64)",
    )
    parser.add_argument(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help=".safetensors LoRA of the few-step mode (default: no few-step mode, or the model's)",
    )
    parser.add_argument(
        "--transformer",
        type=Path,
        metavar="FOLDER",
        help="transformer converted by convert.from_torch (default: the source's)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="MODEL",
        help="folder or Hugging Face repository of the language model, for example a quantized "
        "one (default: a copy of the source's)",
    )
    args = parse(parser)
    check_new(args.output)
    source = find_model(args.source, files=QWEN_FILES)
    with announce("converting the parts of the teacher"):
        convert_teacher(
            source,
            args.output,
            quantization=args.quantize and {"bits": args.quantize, "group_size": args.group_size},
            few_step_lora=args.few_step_lora,
            text_encoder=args.text_encoder,
            transformer=args.transformer,
        )
    print(args.output)


if __name__ == "__main__":
    run_command(main)
