"""The data that the options of `add_data` choose."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlx_snapgen.cli.notices import announce
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.picture_files import Size
from train.data.index import Index, paths_of
from train.data.open import open_data
from train.data.pictures import RecordPictures
from train.data.prepared import prepared_parts
from train.data.prompts import spread
from train.data.selection import HELD_OUT, LEAST_TO_HOLD_OUT, parse_captions
from train.data.source import PromptSource, Source
from train.loop.distributed import print_once
from train.options.common import NUM_PREVIEWS
from train.options.data import check_data, filter_from

INDEX_FOLDER = "data-index"
"""Folder in a run's folder with the indexes of its pictures."""
MOST_NAMED = 8
"""Columns of captions in a line."""


def picture_size(args: argparse.Namespace, source: Source, *, size: Size) -> Size:
    """(height, width) of the square pictures of the data that `data_from` opened.

    Args:
        size: the model's, which data that is not prepared has without `--resolution`.
    """
    side = args.resolution or max((p.resolution for p in prepared_parts(source)), default=None)
    return (side, side) if side else size


def data_from(
    args: argparse.Namespace,
    *,
    size: Size,
    unit: int,
    seed: int,
    run_dir: Path | None = None,
    pictures_only: bool = False,
) -> Source:
    """The data that the options of `add_data` choose: see `open_data`.

    Args:
        size: (height, width) if `--resolution` was not given, the model's.
        unit: sides of pictures are multiples of this.
        run_dir: folder of the run, where the index of the pictures is kept.
        pictures_only: see `open_data`.
    """
    check_data(args, unit=unit)
    source = open_data(
        args.data,
        size=(args.resolution, args.resolution) if args.resolution else size,
        unit=unit,
        seed=seed,
        weights=args.weights,
        captions=parse_captions(args.captions or ()),
        template=args.caption_template,
        filter=filter_from(args),
        share=args.held_out,
        folder=None if run_dir is None else run_dir / INDEX_FOLDER,
        resolution=args.resolution,
        pictures_only=pictures_only,
    )
    records = [part for part in source.sources if isinstance(part, RecordPictures)]
    for part in records:
        _print_skipped(part.index, paths_of(part.source))
    if any(len(part.index.held) < LEAST_TO_HOLD_OUT for part in records):
        note_few(args)
    if not (args.captions or pictures_only):
        for part in records:
            print_columns(paths_of(part.source), part.columns)
        for part in prepared_parts(source):
            print_columns(part.folder, part.columns)
    return source


def open_source(args: argparse.Namespace, config: ModelConfig) -> Source:
    """The data of the options for a model; `UserError` if there is none to train on."""
    with announce("reading the data ..."):
        source = data_from(
            args,
            size=config.image_size,
            unit=config.size_unit,
            seed=args.seed,
            run_dir=args.run_dir,
        )
    check_not_empty(source)
    return source


def print_columns(where: str | Path, columns: Sequence[str]) -> None:
    """A line on the columns of captions behind the first, which are not used."""
    if others := list(columns[1 : 1 + MOST_NAMED]):
        text = ", ".join([*others, *(["..."] if columns[1 + MOST_NAMED :] else [])])
        print_once(
            f"{where}: captions are from the column {columns[0]}; --captions chooses others: {text}"
        )


def _print_skipped(index: Index, where: str) -> None:
    """A line on the pictures that a set leaves out."""
    if index.skipped:
        count = sum(index.skipped.values())
        why = ", ".join(f"{number:,}: {reason}" for reason, number in index.skipped.items())
        share = f"{count:,} of {count + len(index.held):,} pictures skipped"
        print_once(f"{where}: {share} ({why}); train.prepare names each")


def note_few(args: argparse.Namespace) -> None:
    """A line on a `--held-out` that a set of few pictures does not use."""
    if args.held_out not in (0, HELD_OUT):
        print_once(
            f"note: sets of fewer than {LEAST_TO_HOLD_OUT} pictures keep none for validation: "
            f"--held-out {args.held_out:g} is not used"
        )


def check_not_empty(source: Source) -> None:
    """`UserError` for prepared data whose pictures are all kept for validation."""
    for part in prepared_parts(source):
        part.check_not_empty()


def preview_prompts(args: argparse.Namespace, source: PromptSource) -> list[str]:
    """The prompts to draw after every checkpoint."""
    return args.validation_prompts or spread(source.prompts(0, 64), NUM_PREVIEWS)
