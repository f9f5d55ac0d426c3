"""Replace a model's autoencoder by a public one: Qwen-Image's, its tiny one (TAEHV), Flux's, ...

    python -m convert.autoencoder Qwen-Image/vae my-model-qwen --model my-model
    python -m convert.autoencoder taew2_1.safetensors my-model-tiny --model my-model

SOURCE is a folder in diffusers' format (Flux's autoencoder is also Z-Image's), a .safetensors file
of the TAEHV family, or a folder written by `convert.from_torch`. The model must have been trained
on the latents of this autoencoder.
"""

import dataclasses
import json
import shutil
from pathlib import Path

from mlx.utils import tree_flatten

from convert.options import add_output, parse
from mlx_snapgen.checkpoint.config import ModelFolder, load_config
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser, add_model
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import check_new, new_folder, save_tensors
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.public.keys.autoencoders import read_autoencoder


def swap_autoencoder(model: Path, autoencoder: Autoencoder, output: Path) -> None:
    """Copy the model folder `model` to `output` with another autoencoder.

    Raises:
        UserError: the transformer has other latent channels, or `output` is not empty.
    """
    config = dataclasses.replace(load_config(model), autoencoder=autoencoder.config)
    how = {k: v for k, v in (config.quantization or {}).items() if k != "autoencoder"}
    config = dataclasses.replace(config, quantization=how or None)
    with new_folder(output) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        weights = dict(tree_flatten(autoencoder.parameters()))
        path = partial / "autoencoder.safetensors"
        path.unlink()  # may be a link into a cache
        save_tensors(path, weights, {"format": "mlx"})


def main() -> None:
    parser = Parser(prog="python -m convert.autoencoder", description=__doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="folder in diffusers' format or of convert.from_torch, or a .safetensors file",
    )
    add_output(parser)
    add_model(parser, default=None)
    args = parse(parser)
    check_new(args.output)
    model = ModelFolder.open(args.model).path
    with announce("copying the model ..."):
        swap_autoencoder(model, read_autoencoder(args.source), args.output)
    print(args.output)


if __name__ == "__main__":
    run_command(main)
