"""Give a model a public autoencoder: Qwen-Image's, the tiny one of its latents, or Flux's.

    python -m convert.autoencoder Qwen-Image/vae --model my-model --output my-model-qwen
    python -m convert.autoencoder taew2_1.safetensors --model my-model --output my-model-tiny

The first source is a folder as diffusers has it (Flux's is Z-Image's too), the second a
.safetensors file of the TAEHV family. A folder of `convert.from_torch` will do for either. The
model must have been trained on their latents.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from convert.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.config import to_dict
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import new_folder
from mlx_snapgen.networks.autoencoders.base import Autoencoder

# --- Qwen-Image -------------------------------------------------------------------------------


# --- Flux and Z-Image -------------------------------------------------------------------------


# --- the TAEHV family -------------------------------------------------------------------------


# --- both -------------------------------------------------------------------------------------


def swap_autoencoder(model: Path, autoencoder: Autoencoder, output: Path) -> None:
    """Write the model folder `model` as `output`, with another autoencoder, all else as it is.

    Raises:
        UserError: the transformer takes other latents, or `output` holds something.
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
        mx.save_safetensors(str(path), weights, {"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.autoencoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder of diffusers, or a .safetensors file")
    parser.add_argument("--model", required=True, help="folder or repository of the model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, not there yet")
    args = parser.parse_args()
    swap_autoencoder(find_model(args.model), read_autoencoder(args.source), args.output)


if __name__ == "__main__":
    run_command(main)
