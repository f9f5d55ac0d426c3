"""Assemble trained parts into a model folder: `python -m train.export --output FOLDER ...`.

The default model is exported to `mlx_snapgen/models/stickers`, from where the package ships it.
"""

import argparse
import dataclasses
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import FEW_STEP, Components, save_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.config import FOUR_STEPS, STICKERS, ModelConfig
from mlx_snapgen.errors import run_command
from mlx_snapgen.lora.files import load_lora
from train.data.stickers.scenes import first_nouns
from train.data.stickers.vocabulary import BACKGROUNDS, COLOURS
from train.loop.autoencoder import load_autoencoder
from train.loop.run import start_from
from train.objectives.elastic import TextToLatents

NOTICE = """\
These weights are under the MIT licence of mlx_snapgen. They were trained on pictures drawn with the
Noto Color Emoji font, Copyright 2013 Google LLC, SIL Open Font License 1.1.
"""


def assemble(
    flow: Path,
    autoencoder: Path,
    tokenizer: Path,
    num_nouns: int | None,
    config: ModelConfig = STICKERS,
) -> Components:
    """The averaged weights of both runs (or model folders) as one model of `config`'s sizes."""
    tokenizers = [load_tokenizer(tokenizer, c) for c in config.text_encoders]
    pictures = load_autoencoder(autoencoder, num_nouns)
    config = dataclasses.replace(config, autoencoder=pictures.config)
    trained = TextToLatents(config, tokenizers)
    start_from(trained, flow)
    nouns = first_nouns(num_nouns)
    vocabulary = {
        "nouns": [n.name for n in nouns],
        "other_words": sorted({w for n in nouns for w in (n.plural, *n.synonyms)}),
        "colours": list(COLOURS),
        "recolourable": [n.name for n in nouns if n.recolour],
        "backgrounds": list(BACKGROUNDS),
    }
    return Components(
        config=config,
        transformer=trained.transformer,
        autoencoder=pictures,
        text_encoders=trained.text_encoders,
        vocabulary=vocabulary,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m train.export", description=__doc__)
    parser.add_argument("--flow", type=Path, required=True, help="folder of a flow or kd run")
    parser.add_argument("--autoencoder", type=Path, required=True, help="autoencoder run's folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FOLDER",
        help="sizes, as config.json in this folder (default: the stickers model)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--num-nouns", type=int, help="nouns that the run was trained on")
    parser.add_argument(
        "--bits", type=int, choices=[0, 8], default=8, help="0 stores bfloat16 instead of 8 bit"
    )
    parser.add_argument(
        "--few-step-lora", type=Path, help="LoRA of train.kdmd, for drawing in four steps"
    )
    args = parser.parse_args()
    config = load_config(args.config) if args.config else STICKERS
    components = assemble(args.flow, args.autoencoder, args.tokenizer, args.num_nouns, config)
    if args.few_step_lora:
        load_lora(args.few_step_lora, components.transformer, weight=0.0, name=FEW_STEP)
        components.config = dataclasses.replace(components.config, few_step=FOUR_STEPS)
    how = {"bits": args.bits, "group_size": 32}
    quantize = {"transformer": how, "text_encoder_0": how} if args.bits else None
    save_pretrained(
        args.output,
        components,
        quantize=quantize,
        dtype=mx.bfloat16,
        texts={"LICENSE": NOTICE},
    )
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
