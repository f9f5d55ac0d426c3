"""Write a run's trained model as a model folder: `python -m train.export --run RUN ...`.

The sizes, the autoencoder and the text encoders are those of the model that the run trained, as
recorded in its folder; the weights are the averaged ones. The model draws by default at the
resolution and time shift of the training. Public text encoders stay references to their source.
Without `--run`, `--model M --few-step-lora FILE` adds a few-step mode to a model.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import FEW_STEP, Components, load_pretrained, warn_untrained
from mlx_snapgen.checkpoint.runs import OTHER_RUNS, SETTINGS, command_of
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import MODEL_HELP, Parser, bits, integer
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, as_given, run_command
from mlx_snapgen.files import check_new, expanded
from mlx_snapgen.lora.files import few_step_sampler, load_lora
from mlx_snapgen.reading import read_text
from mlx_snapgen.settings import check_size
from train.data.stickers.source import NOTICES
from train.data.stickers.vocabulary import COLLECTIONS, vocabulary_file
from train.loop.assemble import round_autoencoder, save_model
from train.loop.autoencoder import with_decoder
from train.loop.checkpoint import trained_checkpoint
from train.loop.run import recorded, start_from
from train.objectives.elastic import TextToLatents
from train.options.common import add_output, add_removed
from train.options.data import MOST_SIDE, check_resolution

LICENSE = "LICENSE"
REMOVED = {
    "--autoencoder": "give --model, a folder that train.new writes from the same parts",
    "--tokenizer": "give --model, a folder that train.new writes from the same parts",
    "--config": "give --model, a folder that train.new writes from the same parts",
    "--num-nouns": "the vocabulary is the one recorded in the run",
}


def find_recorded_model(run: Path, record: dict[str, Any]) -> ModelFolder:
    """The model of a run; `UserError` if it is not recorded or not there."""
    name = record.get("model")
    if name is None:
        raise UserError(
            f"{run} does not record its model: write one from the same parts with python -m "
            "train.new (--preset, --autoencoder, --tokenizer), and give it with --model"
        )
    try:
        return ModelFolder.open(name)
    except UserError as error:
        raise UserError(f"{error}: give the model that {run} trained with --model") from None


def is_record(record: dict[str, Any]) -> bool:
    """Whether what is read of a record here has its types."""

    def is_size(value: Any) -> bool:
        return type(value) is list and len(value) == 2 and {*map(type, value)} == {int}

    shift, nouns = record.get("time_shift"), record.get("num_nouns")
    sizes = record.get("trained_sizes", [])
    return (
        isinstance(record.get("data"), str)
        and is_size(record.get("image_size", [1, 1]))
        and isinstance(sizes, list)
        and all(map(is_size, sizes))
        and (shift is None or (type(shift) in (int, float) and shift > 0))
        and (nouns is None or type(nouns) is int)
    )


def with_sampling(
    config: ModelConfig, record: dict[str, Any], resolution: int | None
) -> ModelConfig:
    """The config with the sizes and time shift of a run; `UserError` for a wrong size.

    Args:
        resolution: in place of the run's, in pixels, or None.
    """
    sides = (resolution, resolution) if resolution else record.get("image_size", config.image_size)
    height, width = sides
    if resolution:
        check_resolution(resolution, config.size_unit)
    check_size(config, height, width)
    shift = record.get("time_shift", config.sampler.time_shift)
    sampler = dataclasses.replace(config.sampler, time_shift=shift)
    # Older runs did not record the sizes of their pictures; those on stickers have one.
    known = [] if record else config.trained_sizes
    if collection := COLLECTIONS.get(record.get("data", "")):
        known = collection.shapes
    trained = tuple((h, w) for h, w in record.get("trained_sizes", known))
    return dataclasses.replace(
        config, image_size=(height, width), trained_sizes=trained, sampler=sampler
    )


def trained_model(model: ModelFolder, run: Path | None) -> Components:
    """A model with the averaged weights of a run, or its own."""
    components = load_pretrained(model)
    if run is not None:
        start_from(TextToLatents.of(components), run)
    return components


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = Parser(
        prog="python -m train.export",
        description=__doc__,
        renamed={"--bits": "--quantize", "--flow": "--run"},
    )
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder of train.flow or train.kd (default: none, the weights of --model)",
    )
    add(
        "--model",
        metavar="MODEL",
        help=f"{MODEL_HELP} (default: the one that the run recorded)",
    )
    add_output(parser, "model folder to write")
    add(
        "--quantize",
        type=bits(8),
        default=8,
        metavar="BITS",
        help="bits per stored weight: 8, or none for bfloat16 (default: 8)",
    )
    add(
        "--decoder",
        type=Path,
        metavar="DIR",
        help="run folder of train.autoencoder --decoder-only --init-from MODEL, whose decoder to "
        "take (default: the model's)",
    )
    add(
        "--few-step-lora",
        type=Path,
        metavar="FILE",
        help="LoRA of train.kdmd to add as the few-step mode (default: no few-step mode)",
    )
    add(
        "--resolution",
        type=integer(1, MOST_SIDE),
        metavar="PX",
        help="height and width of the pictures that the model draws by default, in pixels "
        "(default: that of the run's data, or the model's)",
    )
    add_removed(parser, REMOVED)
    args = parser.parse_args()
    check_new(args.output)
    return args


def open_run(run: Path) -> dict[str, Any]:
    """The record of a run; `UserError` for a folder that is none, or none with a model."""
    if not run.is_dir():
        raise UserError(f"no run folder {run}")
    if (run / "config.json").is_file():
        raise UserError(f"{run} is a model folder, not a run: give it with --model")
    if trained_checkpoint(run) and (command := command_of(run)) in OTHER_RUNS:
        raise UserError(f"{run} is a run of {command}: {OTHER_RUNS[command]}")
    # Runs of older versions have no record; they trained on stickers.
    record: dict[str, Any] = {"data": "stickers"} | recorded(run)
    if not is_record(record):
        raise UserError(
            f"{run / SETTINGS} is damaged: delete it, and give --model and --resolution"
        )
    return record


def main() -> None:
    args = parse()
    few_step = few_step_sampler(args.few_step_lora) if args.few_step_lora else None
    run = expanded(args.run) if args.run else None
    record = open_run(run) if run else {}
    if args.model:
        model = ModelFolder.open(args.model)
    elif run:
        model = find_recorded_model(run, record)
    else:
        raise UserError("give --run, the folder of a run, or --model")
    config = with_sampling(model.config, record, args.resolution)
    shown = as_given(run or model.path)
    with announce(f"loading {shown} ..."):
        components = trained_model(model, run)
    warn_untrained(components.transformer, shown, result="the exported model draws noise")
    components.config = dataclasses.replace(
        components.config,
        image_size=config.image_size,
        trained_sizes=config.trained_sizes,
        sampler=config.sampler,
    )
    if args.decoder:
        components.autoencoder = with_decoder(components.autoencoder, args.decoder)
        if "autoencoder" in (model.config.quantization or {}):
            round_autoencoder(components.autoencoder)  # the encoder is rounded already
    texts = {}
    if collection := COLLECTIONS.get(record.get("data", "")):
        components.vocabulary = vocabulary_file(record.get("num_nouns"), collection)
        texts = {LICENSE: NOTICES[collection.name]}
    else:
        if run:
            components.vocabulary = None
        if (license := model.path / LICENSE).is_file():
            texts = {LICENSE: read_text(license)}
    if args.few_step_lora:
        load_lora(args.few_step_lora, components.transformer, weight=0.0, name=FEW_STEP)
        components.config = dataclasses.replace(components.config, few_step=few_step)
    with announce(f"writing {args.output} ..."):
        save_model(args.output, components, bits=args.quantize, texts=texts)
    size = sum(f.stat().st_size for f in args.output.iterdir())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
