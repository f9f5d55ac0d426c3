"""Options of `train.new`."""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.config import ModelFolder, load_config
from mlx_snapgen.checkpoint.runs import check_is_no_run
from mlx_snapgen.cli.options import Parser, integer
from mlx_snapgen.config import (
    AutoencoderConfig,
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from mlx_snapgen.errors import UserError, naming, nearest
from mlx_snapgen.files import check_new, expanded
from mlx_snapgen.json_values import from_dict
from mlx_snapgen.presets import DC_AE, TRANSFORMERS, preset_autoencoder
from mlx_snapgen.reading import read_json
from train.data.open import (
    check_one_kind,
    check_there,
    is_prepared,
    is_stickers,
    open_data,
    open_records,
)
from train.data.prepared import Prepared
from train.data.source import Record, Skipped, describe_skipped
from train.data.stickers.model import FLUENT_STICKERS, STICKERS
from train.data.text import is_trained
from train.loop.autoencoder import STATISTICS_SEED
from train.loop.checkpoint import latest_checkpoint
from train.loop.run import recorded
from train.options.common import add_seed, check_at_least
from train.options.data import add_captions, check_captions

RESOLUTION = 256
OWN = TextEncoderConfig(max_length=64)
SAMPLER = SamplerConfig(time_shift=None)


@dataclass(frozen=True)
class Preset:
    """Sizes and settings of a model, without its autoencoder.

    Attributes:
        own: of the text encoder that is trained with the model.
        size: (height, width) of the pictures in pixels.
        downsampling: that the autoencoder must have; None for any.
        round_autoencoder: so that the model stores it in 8 bits. Others keep 32.
    """

    transformer: TransformerConfig
    own: TextEncoderConfig = OWN
    sampler: SamplerConfig = SAMPLER
    size: tuple[int, int] = (RESOLUTION, RESOLUTION)
    unconditional: str = "absent"
    downsampling: int | None = None
    round_autoencoder: bool = False


def preset_of(model: ModelConfig) -> Preset:
    """The sizes and settings of a model."""
    own = [config for config in model.text_encoders if is_trained(config)]
    return Preset(
        model.transformer,
        own[0] if own else OWN,
        model.sampler,
        model.image_size,
        model.unconditional,
    )


PRESETS = {
    name: Preset(config, size=(1024, 1024), downsampling=DC_AE.downsampling)
    if preset_autoencoder(name) is DC_AE
    else Preset(config)
    for name, config in TRANSFORMERS.items()
}
PRESETS[STICKERS.name] = preset_of(STICKERS)
PRESETS[FLUENT_STICKERS.name] = replace(preset_of(FLUENT_STICKERS), round_autoencoder=True)
"""Values of `--preset`."""


def parse() -> argparse.Namespace:
    """The command's options, checked; `preset` is a `Preset`."""
    parser = Parser(
        prog="python -m train.new",
        description="Write an untrained model folder: an elastic transformer with random weights,\n"
        "an autoencoder, and text encoders.",
    )
    add = parser.add_argument
    what = "model folder to write; must not exist"
    add("out", nargs="?", type=Path, metavar="OUT", help=what)
    add("-o", "--output", type=Path, metavar="OUT", help="another way to give OUT")
    add(
        "--preset",
        required=True,
        metavar="NAME|FILE",
        help=f"sizes: {', '.join(PRESETS)} (-f32 is for DC-AE); a JSON file with fields of "
        "TransformerConfig; or a model folder, whose sizes and settings are used",
    )
    add(
        "--autoencoder",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="autoencoder: model folder, folder of convert.from_torch, or run folder of "
        "train.autoencoder",
    )
    add(
        "--text-encoder",
        dest="text_encoders",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER|REPO",
        help="public text encoders, CLIP or Gemma 3: folders or Hugging Face repositories. The "
        "model refers to them; they are not trained (default: none)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="sentencepiece .model file, such as train.tokenizer writes: adds a text encoder that "
        "is trained with the model (default: no such encoder)",
    )
    for name, what in (
        ("size", "hidden size"),
        ("layers", "layers"),
        ("length", "tokens per caption"),
    ):
        add(
            f"--encoder-{name}",
            type=integer(1, 2**16),
            metavar="N",
            help=f"{what} of the text encoder of --tokenizer (default: the preset's)",
        )
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="SOURCE",
        help="pictures to measure the latents of a run of train.autoencoder on, once for all "
        "models of the run (default: those that it was trained on)",
    )
    add_captions(parser, weights=False)
    add(
        "--resolution",
        type=integer(1, 2**16),
        metavar="PX",
        help="height and width of the pictures that the model draws by default, in pixels "
        f"(default: the preset's, mostly {RESOLUTION})",
    )
    add(
        "--weights-from",
        metavar="NAME|FOLDER|REPO",
        help="start from the weights of this model of ours where names and shapes agree, and from "
        "its embeddings of the same tokens (default: random weights)",
    )
    add_seed(parser)
    args = parser.parse_args()
    if (args.out is None) == (args.output is None):
        parser.error("name the output once, as OUT or with --output")
    args.output = args.output or args.out
    check_new(args.output)
    check_at_least(args, 0, "seed")
    check_captions(args)
    for spec in args.data or ():
        check_there(spec)
    check_one_kind(args.data or ())
    if not (args.text_encoders or args.tokenizer):
        raise UserError("a model needs a text encoder: give --text-encoder, --tokenizer or both")
    args.preset = _with_sizes(args, read_preset(args.preset))
    args.start = _start(args.weights_from) if args.weights_from else None
    return args


def _start(model: str) -> ModelFolder:
    """The model of `--weights-from`; `UserError` if it is none of ours."""
    check_is_no_run(expanded(model))
    if latest_checkpoint(expanded(model)) is not None:
        raise UserError(f"--weights-from {model} is a run: write a model with train.export first")
    return ModelFolder.open(model)


def pictures_of(args: argparse.Namespace, run: Path) -> list[str]:
    """The SOURCEs of `--data`, or those that a run of train.autoencoder was trained on, if any."""
    return args.data or recorded(run).get("specs") or []


FIRST = 256
"""Records in which a column of captions is looked for."""


def check_columns(args: argparse.Namespace, sources: Sequence[str]) -> None:
    """Print a line on pictures without captions, and on a column that the first ones do not have.

    Raises:
        UserError: a column of `--captions` that no picture has.
    """
    columns: list[str] = args.captions or []
    for spec in sources:
        if is_prepared(spec):
            Prepared(expanded(spec), captions=dict.fromkeys(columns, 1.0))
        elif not is_stickers(spec):
            _check_records(spec, columns, template=args.caption_template)


def _check_records(spec: str, columns: Sequence[str], *, template: str | None) -> None:
    source = open_records([spec], template=template, columns=columns)
    found: dict[str, None] = {}
    skipped: Skipped | None = None
    count = 0
    for record in itertools.islice(source.records(), FIRST):
        count += 1
        if isinstance(record, Record):
            found |= dict.fromkeys(name for name, text in record.captions.items() if text)
        else:
            skipped = skipped or record
    is_whole = count < FIRST
    if not found:
        such = f", such as {describe_skipped(skipped)}" if skipped else ""
        print(
            f"warning: {spec if is_whole else f'the start of {spec}'} has no picture with a "
            f"caption{such}: an autoencoder needs none, but the commands that follow do",
            file=sys.stderr,
        )
        return
    for column in columns:
        if column in found:
            continue
        if is_whole:
            raise UserError(
                f"--captions {column}: {spec} has no such column{nearest(column, found)}; it has: "
                f"{', '.join(found)}"
            )
        print(
            f"warning: none of the first {FIRST:,} pictures of {spec} has a caption '{column}'",
            file=sys.stderr,
        )


def check_autoencoder(preset: Preset, autoencoder: AutoencoderConfig) -> None:
    """`UserError` if the preset is for another kind of latents."""
    if preset.downsampling not in (None, autoencoder.downsampling):
        raise UserError(
            f"a preset named -f32 is for an autoencoder whose latents have 1/{preset.downsampling} "
            f"of a picture's side; this one has 1/{autoencoder.downsampling}: omit -f32"
        )


def statistics_source(args: argparse.Namespace, run: Path) -> Any:
    """The pictures to measure the latents of a run of train.autoencoder on."""
    record = recorded(run)
    specs = pictures_of(args, run)
    for spec in filter(is_prepared, specs):
        raise UserError(f"--data: {spec} holds latents; give the pictures themselves")
    if not specs:
        # Runs of older versions learned from stickers.
        nouns = record.get("num_nouns")
        specs = [STICKERS.name + ("" if nouns is None else f":nouns={nouns}")]
    side = record.get("resolution", RESOLUTION)
    return open_data(specs, size=(side, side), unit=32, seed=STATISTICS_SEED, pictures_only=True)


def read_preset(name: str) -> Preset:
    """The preset of a name, a file or a model folder; `UserError` for any other."""
    path = expanded(name)
    if name not in PRESETS and path.is_dir():
        return preset_of(load_config(path))
    if name not in PRESETS and path.is_file():
        return Preset(_read_transformer(path))
    if name not in PRESETS:
        raise UserError(
            f"--preset {name}: no such preset, file or model folder{nearest(name, PRESETS)}"
        )
    return PRESETS[name]


def _read_transformer(path: Path) -> TransformerConfig:
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f'{path} must hold fields of TransformerConfig: {{"hidden_size": ...}}')
    with naming(path):
        return from_dict(TransformerConfig, values)


def _with_sizes(args: argparse.Namespace, preset: Preset) -> Preset:
    """The preset with the sizes of the options."""
    own, size = preset.own, args.encoder_size or preset.own.hidden_size
    if size != own.hidden_size:
        head = own.hidden_size // own.num_heads
        heads = next(n for n in range(max(1, size // head), 0, -1) if size % n == 0)
        own = replace(own, hidden_size=size, num_heads=heads)
    own = replace(
        own,
        num_layers=args.encoder_layers or own.num_layers,
        max_length=args.encoder_length or own.max_length,
    )
    given = (args.resolution, args.resolution) if args.resolution else preset.size
    return replace(preset, own=own, size=given)
