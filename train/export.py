"""Assemble trained parts into a model folder: `python -m train.export --output FOLDER ...`.

The built-in model is such a folder, `mlx_snapgen/models/stickers`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.model import FEW_STEP, Components, save_pretrained
from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.config import FOUR_STEPS, ModelConfig
from mlx_snapgen.errors import run_command
from mlx_snapgen.lora.files import load_lora
from train.data.source import PictureSource
from train.data.stickers.model import STICKERS
from train.data.stickers.source import NOTICE, Stickers, add_num_nouns
from train.data.stickers.vocabulary import vocabulary_file
from train.loop.autoencoder import STATISTICS_SEED, load_autoencoder
from train.loop.run import find_folder, recorded, start_from
from train.objectives.elastic import TextToLatents
from train.options.common import add_output, check_new


def assemble(
    flow: Path,
    autoencoder: Path,
    *,
    tokenizer: Path,
    source: PictureSource | None,
    config: ModelConfig,
) -> Components:
    """The averaged weights of two runs (or model folders) as one model.

    Args:
        flow: run of the transformer and the text encoders.
        autoencoder: run of the autoencoder.
        source: see `load_autoencoder`.
        config: sizes of the model.
    """
    tokenizers = [load_tokenizer(tokenizer, c) for c in config.text_encoders]
    pictures = load_autoencoder(autoencoder, source)
    config = dataclasses.replace(config, autoencoder=pictures.config)
    trained = TextToLatents(config, tokenizers)
    start_from(trained, flow)
    return Components(
        config=config,
        transformer=trained.transformer,
        autoencoder=pictures,
        text_encoders=trained.text_encoders,
    )


def main() -> None:
    parser = Parser(
        prog="python -m train.export", description=__doc__, renamed={"--bits": "--quantize"}
    )
    add = parser.add_argument
    add(
        "--flow",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder of train.flow or train.kd, or model folder",
    )
    add(
        "--autoencoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="run folder of train.autoencoder, or model folder",
    )
    add("--tokenizer", type=Path, required=True, metavar="FILE", help="sentencepiece .model file")
    add(
        "--config",
        type=Path,
        metavar="FOLDER",
        help="folder with a config.json of the model's sizes (default: the stickers model's)",
    )
    add_output(parser, "model folder to write")
    add_num_nouns(parser, "write the first N nouns as vocabulary (default: as recorded in the run)")
    add(
        "--quantize",
        type=int,
        choices=[0, 8],
        default=8,
        metavar="BITS",
        help="bits per stored weight: 8, or 0 for bfloat16 without quantization (default: 8)",
    )
    add(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help="LoRA of train.kdmd to add as the few-step mode (default: no few-step mode)",
    )
    args = parser.parse_args()
    check_new(args.output)
    config = load_config(args.config) if args.config else STICKERS
    flow = find_folder(args.flow)
    # Runs of older versions have no record; they trained on stickers.
    record: dict[str, Any] = {"data": "stickers"} | recorded(flow)
    source, vocabulary, texts = None, None, {}
    if record["data"] == "stickers":
        num_nouns = record.get("num_nouns") if args.num_nouns is None else args.num_nouns
        source = Stickers(STATISTICS_SEED, num_nouns)
        vocabulary, texts = vocabulary_file(num_nouns), {"LICENSE": NOTICE}
    components = assemble(
        flow,
        find_folder(args.autoencoder),
        tokenizer=args.tokenizer,
        source=source,
        config=config,
    )
    components.vocabulary = vocabulary
    if args.few_step_lora:
        load_lora(args.few_step_lora, components.transformer, weight=0.0, name=FEW_STEP)
        components.config = dataclasses.replace(components.config, few_step=FOUR_STEPS)
    how = {"bits": args.quantize, "group_size": 32}
    quantize = {"transformer": how, "text_encoder_0": how} if args.quantize else None
    save_pretrained(args.output, components, quantize=quantize, dtype=mx.bfloat16, texts=texts)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
