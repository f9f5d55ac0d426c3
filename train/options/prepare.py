"""Options of `train.prepare`."""

import argparse
import os
import re
from pathlib import Path

from mlx_snapgen.cli.options import Parser, add_steps_and_guidance, integer, option_of
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_writable, expanded
from mlx_snapgen.settings import BUILT_IN, check_pixels
from train.loop.assemble import check_converted
from train.loop.run import check_no_run
from train.options.common import (
    MOST_SEED,
    TEACHER_HELP,
    add_number,
    add_teacher_source,
    check_at_least,
    check_outside,
)
from train.options.data import add_resolution, add_selection, check_captions, filter_from

SHARD_MEGABYTES = 256
MOST_IN_SHARD = 2048
"""Pictures in a shard, so that a command that is killed loses little work."""
MOST_DRAWN_BATCHES = 8
"""The same of a drawn set, in batches: drawing takes longer than encoding."""
FLAGS_OF_DRAWING = ("prompts_file", "per_prompt", "num_inference_steps", "guidance_scale")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options, checked; `workers` has its default."""
    parser = Parser(
        prog="python -m train.prepare",
        description="Encode captioned pictures for training, once, or let a teacher draw them.\n"
        "Run the same command again to resume.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folder of pictures with captions, .tar files of WebDataset or .parquet files; "
        "several are read one after the other",
    )
    add(
        "--output",
        "-o",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; name the folder of an unfinished set to resume it",
    )
    add(
        "--model",
        metavar="MODEL",
        help="model whose autoencoder encodes the pictures: folder, Hugging Face repository, "
        f"{BUILT_IN}, or an autoencoder of convert.from_torch (default: with --draw-with, the "
        "teacher)",
    )
    add_resolution(
        parser,
        default="that of the model, or with --draw-with of the teacher; 256 for an autoencoder",
    )
    add_selection(parser, weights=False)
    add(
        "--text-states",
        nargs="+",
        default=[],
        metavar="NAME",
        help="frozen text encoders of the model whose states to store, such as gemma; without it, "
        "training encodes the captions (default: none)",
    )
    add(
        "--teacher",
        metavar="MODEL",
        help="also store the text states of this teacher, for distillation, and its latents if its "
        f"autoencoder is another one: {TEACHER_HELP} (default: no teacher)",
    )
    add_teacher_source(parser)
    add(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="do part I of N; run the other parts on other machines, with the same options and a "
        "shared folder or one whose shards/ is copied there afterwards (default: 1/1)",
    )
    add(
        "--workers",
        type=integer(1, 1024),
        metavar="N",
        help="threads that decode pictures (default: the number of CPU cores, at most 16)",
    )
    add_number(parser, "--batch-size", 8, "pictures to encode at a time")
    add_number(
        parser,
        "--shard-size",
        SHARD_MEGABYTES,
        "size of a shard in MB, about; a command that is killed loses the unfinished one",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the number of pictures, time and disk space, and stop (default: off)",
    )
    drawing = parser.add_argument_group("to let a teacher draw the pictures")
    add = drawing.add_argument
    add(
        "--draw-with",
        metavar="MODEL",
        help=f"draw the pictures instead of reading SOURCE, with a teacher: {TEACHER_HELP}; of "
        "--teacher-revision or --teacher-base (default: off)",
    )
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="prompts to draw, one per line; required with --draw-with",
    )
    add(
        "--per-prompt",
        type=integer(1, 10**6),
        metavar="N",
        help="pictures of each prompt (default: 1)",
    )
    add_steps_and_guidance(drawing)
    add_number(drawing, "--seed", 0, "seed of the first picture; the others follow", most=MOST_SEED)
    args = parser.parse_args(argv)
    args.output = expanded(args.output)
    args.workers = args.workers or min(16, os.cpu_count() or 1)
    _check(args)
    args.per_prompt = args.per_prompt or 1
    return args


def _check(args: argparse.Namespace) -> None:
    filter_from(args)
    check_captions(args)
    check_at_least(args, 1, "batch_size", "shard_size")
    if args.resolution is not None:
        check_pixels(args.resolution, args.resolution)
    check_at_least(args, 0, "seed")
    if args.draw_with is None:
        if given := [name for name in FLAGS_OF_DRAWING if getattr(args, name) is not None]:
            raise UserError(f"{option_of(given[0])} takes --draw-with TEACHER")
        if not args.sources:
            raise UserError("give a SOURCE of pictures, or --draw-with TEACHER --prompts-file FILE")
        if args.model is None:
            raise UserError("give --model MODEL: its autoencoder encodes the pictures")
    elif args.sources:
        raise UserError(f"--draw-with takes no SOURCE: leave out {args.sources[0]}")
    elif args.prompts_file is None:
        raise UserError("--draw-with takes --prompts-file FILE with the prompts to draw")
    elif args.teacher is not None:
        raise UserError("--draw-with draws with one teacher: leave out --teacher")
    if args.text_states and args.model is None:
        raise UserError("--text-states takes --model MODEL, whose text encoders they are")
    if args.model is not None:
        check_converted(expanded(args.model))
    check_outside("--output", args.output, sources=args.sources)
    check_no_run(args.output)
    check_writable(args.output)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"give I/N such as 1/4, not '{text}'")
    return int(match[1]), int(match[2])


EPILOG = """
Captions: a .txt file beside each picture, or a metadata.jsonl with lines
{"file_name": "cat.png", "text": "a cat"} or a metadata.csv with these columns; in .tar files,
members of one name such as 1.jpg and 1.txt; in .parquet files, columns of text. Pictures may have
any size and shape: each is cropped to the nearest of a few shapes. report.json, sizes.png,
sheet.png and skipped.jsonl in DIR describe the result; train.flow --data DIR and the other training
commands read it.
"""
