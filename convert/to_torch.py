"""Write a model for PyTorch, at one width.

    python -m convert.to_torch my-model my-model-torch --model-width small

OUT gets config.json, transformer.safetensors, and for the default model's kinds of networks also
decoder.safetensors and text_encoder_<n>.safetensors with its tokenizer. Load it with

    from convert.pytorch.efficient_dit import load
    model = load("my-model-torch")

and convert it back, for example after more training in PyTorch, with

    python -m convert.from_torch my-model-torch my-new-model --model my-model
"""

import mlx.core as mx

from convert.libraries import require
from convert.options import add_output, parse
from convert.pytorch.weights import to_torch
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.settings import WIDTH_NAMES, check_width


def main() -> None:
    parser = Parser(
        prog="python -m convert.to_torch", description=__doc__, renamed={"--width": "--model-width"}
    )
    parser.add_argument("model", help="stickers, or folder or Hugging Face repository of a model")
    add_output(parser)
    parser.add_argument(
        "--model-width",
        choices=WIDTH_NAMES,
        default="full",
        help="network width to write (default: full)",
    )
    args = parse(parser)
    check_new(args.output)
    require("torch", "torch", "safetensors")
    folder = find_model(args.model)
    width = check_width(load_config(folder), args.model_width)
    with announce("loading and writing the model"):
        components = load_pretrained(folder, dtype=mx.float32, share=width.share)
        missing = to_torch(components, args.output, width=width.name)
    for name in missing:
        print(f"{name} is not written: use the public one")
    print(args.output)


if __name__ == "__main__":
    run_command(main)
