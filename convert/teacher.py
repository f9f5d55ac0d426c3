"""Convert a public flow model to a teacher for `train.kd` and `train.kdmd`.

    python -m convert.teacher Qwen/Qwen-Image qwen-image --quantize 4
    python -m convert.teacher Tongyi-MAI/Z-Image-Turbo z-image
    python -m convert.teacher Qwen/Qwen-Image qwen-image --quantize 4 \\
        --few-step-lora Qwen-Image-Lightning-4steps-V1.0.safetensors
    python -m convert.teacher black-forest-labs/FLUX.2-klein-base-4B klein --quantize 4 \\
        --few-step-model black-forest-labs/FLUX.2-klein-4B

    python -m convert.teacher z_image_turbo_fp8.safetensors z-image --quantize 4 \\
        --base Tongyi-MAI/Z-Image-Turbo

SOURCE is a folder in diffusers' format, a Hugging Face repository, or one .safetensors file with a
transformer, such as ComfyUI's. This command cannot resume an
interrupted conversion, but `convert.from_torch` can: convert a large transformer with it first, and
give its folder as --transformer.
"""

import argparse
from pathlib import Path

from convert.options import add_output, add_quantize, parse
from mlx_snapgen.checkpoint.hub import find_model, quiet
from mlx_snapgen.checkpoint.module import BITS, GROUP_SIZES
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import BASE_HELP, Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.formats import find_minit2i, is_teacher
from mlx_snapgen.open_model import describe_public
from mlx_snapgen.public.files import fetch_public
from mlx_snapgen.public.teachers import (
    TeacherParts,
    convert_teacher,
    few_step_network,
    read_network,
)

FEW_STEP_FILES = ("transformer/*.json", "transformer/*.safetensors")
"""Of the repository of a distilled model; the rest is as in the teacher's."""


def _check_few_step(args: argparse.Namespace, transformer: Path) -> None:
    """`UserError` if the few-step model has another config than a transformer's folder.

    Weights are fetched later.
    """
    if args.few_step_model is not None:
        files = FEW_STEP_FILES[:1]
        described = find_model(args.few_step_model, files=files, progress=quiet)
        few_step_network(described, read_network(transformer)[1])


def main() -> None:
    parser = Parser(
        prog="python -m convert.teacher", description=__doc__, renamed={"--bits": "--quantize"}
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder in diffusers' format, Hugging Face repository, or .safetensors file of a "
        "transformer",
    )
    add_output(parser)
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a repository (default: main)"
    )
    parser.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    add_quantize(parser, "the blocks of the transformer", known=BITS)
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=64,
        help="weights per quantization scale (default: 64)",
    )
    parser.add_argument(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help=".safetensors LoRA of the few-step mode (default: the few-step mode of SOURCE, if it "
        "has one)",
    )
    parser.add_argument(
        "--few-step-model",
        metavar="MODEL",
        help="distilled model whose transformer is the few-step mode: folder in diffusers' format, "
        "Hugging Face repository, or folder of convert.from_torch with the transformer (default: "
        "none)",
    )
    parser.add_argument(
        "--transformer",
        type=Path,
        metavar="FOLDER",
        help="folder of convert.from_torch with the transformer (default: convert that of SOURCE)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="MODEL",
        help="folder or Hugging Face repository of the language model, for example a quantized "
        "one (default: a copy of that in SOURCE)",
    )
    args = parse(parser)
    check_new(args.output)
    # The repository of MiniT2I has the models in folders.
    folder = Path(args.source)
    if args.base is None and folder.is_dir() and not find_minit2i(folder):
        # May lack the parts that other options replace.
        source, file, text = find_model(args.source, revision=args.revision), None, None
        if is_teacher(source):
            raise UserError(f"{args.source} is converted already: give what it was made of")
        _check_few_step(args, args.transformer or source / "transformer")
    else:
        model = describe_public(args.source, revision=args.revision, base=args.base)
        if model.file is not None and args.transformer is not None:
            raise UserError(f"{args.source} is a transformer: leave out --transformer")
        _check_few_step(args, args.transformer or model.folder / model.inside / "transformer")
        (source, text), file = fetch_public(model), model.file
    few_step_model = None
    if args.few_step_model is not None:
        few_step_model = find_model(args.few_step_model, files=FEW_STEP_FILES)
    how = {"bits": args.quantize, "group_size": args.group_size}
    with announce("converting the parts of the teacher ..."):
        convert_teacher(
            source,
            args.output,
            TeacherParts(
                few_step_lora=args.few_step_lora,
                few_step_model=few_step_model,
                file=file,
                text_encoder=args.text_encoder,
                text_source=text,
                transformer=args.transformer,
            ),
            quantization=how if args.quantize else None,
        )
    print(args.output)


if __name__ == "__main__":
    run_command(main)
