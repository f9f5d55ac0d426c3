"""Write a model for PyTorch, at one width.

    python -m convert.to_torch my-model my-model-torch --width small

The folder gets config.json, transformer.safetensors, and of the default model's kinds also
decoder.safetensors and text_encoder_<n>.safetensors with its tokenizer. Read it with

    from convert.pytorch.efficient_dit import load
    model = load("my-model-torch")

and bring it back, trained further perhaps, with

    python -m convert.from_torch my-model-torch my-new-model --model my-model
"""

import argparse
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx

from convert.pytorch.weights import to_torch
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.settings import WIDTH_NAMES, check_width, parse_width


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.to_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or repository of the model")
    parser.add_argument("output", type=Path, help="folder to write, not there yet")
    parser.add_argument("--width", choices=WIDTH_NAMES, default="full", help="default: full")
    args = parser.parse_args()
    import convert.pytorch.efficient_dit  # noqa: F401  before anything is loaded, if torch is missing

    check_new(args.output)
    folder = find_model(args.model)
    check_width(load_config(folder), args.width)
    components = load_pretrained(folder, dtype=mx.float32, share=parse_width(args.width).share)
    for name in to_torch(components, args.output, args.width):
        print(f"{name} is not written: take the public one")


if __name__ == "__main__":
    run_command(main)
