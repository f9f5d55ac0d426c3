"""Convert a model to PyTorch, at one width.

    python -m convert.to_torch my-model my-model-torch --model-width small

The command writes config.json and transformer.safetensors into OUT. For models like the built-in
one it also writes decoder.safetensors, text_encoder_<n>.safetensors and the tokenizer. Load it with

    from convert.pytorch.efficient_dit import load
    model = load("my-model-torch")

and convert it back, for example after more training in PyTorch, with

    python -m convert.from_torch my-model-torch my-new-model --model my-model
"""

import mlx.core as mx

from convert.libraries import require
from convert.options import add_output, parse
from convert.pytorch.weights import to_torch
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import MODEL_HELP, Parser
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.settings import WIDTH_NAMES, check_width


def main() -> None:
    parser = Parser(
        prog="python -m convert.to_torch", description=__doc__, renamed={"--width": "--model-width"}
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_output(parser)
    parser.add_argument(
        "--model-width",
        choices=WIDTH_NAMES,
        default="full",
        metavar="NAME",
        help="network width to convert: full, small (1/2) or tiny (3/8) (default: full)",
    )
    args = parse(parser)
    check_new(args.output)
    require("torch", "torch", "safetensors")
    model = ModelFolder.open(args.model)
    width = check_width(model.config, args.model_width)
    with announce("loading and writing the model ..."):
        components = load_pretrained(model, dtype=mx.float32, share=width.share)
        missing = to_torch(components, args.output, width=width.name)
    for name in missing:
        print(f"{name} is not converted: use the public original")
    print(args.output)


if __name__ == "__main__":
    run_command(main)
