"""Options of `train.lora`."""

import argparse
import os
from pathlib import Path
from typing import Any

from mlx_snapgen.cli.options import (
    Parser,
    add_model,
    add_model_source,
    add_model_widths,
    finite_number,
    integer,
    option_of,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import expanded
from mlx_snapgen.metadata import slug
from mlx_snapgen.settings import check_size
from mlx_snapgen.teachers.config import TeacherConfig
from train.data.readers.folder import check_template
from train.data.stickers.own_thing import MOST_LOOKS
from train.loop.run import check_run_folder
from train.options.common import (
    MOST_RANK,
    add_number,
    add_output,
    add_run_dir,
    add_tuning,
    check_alpha,
    check_at_least,
    check_at_most,
    check_new_lora,
    check_outside,
    check_tuning,
)
from train.options.data import add_caption_template, check_resolution

TARGETS = ("*_proj", "ffn.linear*", "text.*.linear")
"""Layers that get an adapter."""
PUBLIC_TARGETS = {
    "minit2i": ("*qkv", "*attn_proj", "*mlp.w?"),
    "flux2": ("attn.*", "ff.*", "ff_context.*"),
    "qwen-image": ("attn.*", "img_mlp.*", "txt_mlp.*"),
    "z-image": ("attention.to_*", "feed_forward.w*"),
}
"""By the kind of a public model: attention and feed-forward."""
OWN: dict[str, Any] = {
    **{"steps": 400, "batch_size": 8, "checkpoint_every": 100, "learning_rate": 1e-3},
    **{"prior_weight": 4.0, "drop_caption": 0.1, "targets": TARGETS},
}
THING: dict[str, Any] = {
    **{"steps": 600, "checkpoint_every": 200, "learning_rate": 3e-3, "prior_weight": 2.0},
}
"""Other defaults with --thing."""
PUBLIC: dict[str, Any] = {
    **{"steps": 1000, "batch_size": 1, "checkpoint_every": 250, "learning_rate": 1e-4},
    **{"prior_weight": 0.0, "resolution": 512},
}
"""Defaults for a model of this project and for a public one, see `fill`."""
MOST_NAME = 255 - len(".safetensors")
"""Bytes of the name of a folder after which the outputs are named."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options, checked; those that `fill` sets are None if they were not given."""
    parser = Parser(
        prog="python -m train.lora",
        description="Fine-tune a model on a folder of pictures: the built-in model on cut-outs of\n"
        "one thing (--thing NOUN), others on pictures with captions. The result is a LoRA for\n"
        "`python -m mlx_snapgen.generate PROMPT --lora FILE`. Run the same command again to\n"
        "resume.",
        epilog=EPILOG,
        renamed={"--widths": "--model-widths"},
    )
    add = parser.add_argument
    add(
        "--data",
        action="append",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of pictures with captions; with --thing of cut-outs",
    )
    add_caption_template(parser)
    add(
        "--thing",
        metavar="NOUN",
        help="teach a new thing with this name: the pictures are cut-outs of it, with transparent "
        f"surroundings and without captions, at most {MOST_LOOKS}; only for "
        "models with semantic latents; with other defaults, "
        + ", ".join(f"{option_of(name)} {value:g}" for name, value in THING.items())
        + " (default: train on pictures with captions)",
    )
    add("--plural", metavar="NOUN", help="plural of --thing (default: the regular one)")
    add_model(parser)
    add_model_source(parser, quantize="train on 4 or 8 bits per weight of a public model, or none")
    add_output(parser, "LoRA file to write (default: FOLDER.safetensors)", required=False)
    add_run_dir(parser, default="runs/FOLDER")
    add_tuning(parser, OWN, PUBLIC)
    add_number(parser, "--accumulate", 1, "batches per training step")
    add(
        "--save-memory",
        action="store_true",
        help="recompute the blocks in the backward pass: less memory, more time (default: off)",
    )
    add_number(parser, "--rank", 16, "rank of the LoRA; a higher rank learns more and forgets more")
    add(
        "--alpha",
        type=finite_number,
        metavar="A",
        help="multiply the LoRA by alpha / rank (default: the rank, so that the factor is 1)",
    )
    add(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help=f"name patterns of the layers to train (default: {' '.join(TARGETS)}; for a public "
        "model its layers of attention and feed-forward)",
    )
    add_model_widths(parser, default=None)
    add("--flip", action="store_true", help="also train on mirror images (default: off)")
    add(
        "--drop-caption",
        type=finite_number,
        metavar="N",
        help="share of captions to leave out, which guidance needs (default: 0.1; for a distilled "
        "model, which draws without guidance, 0)",
    )
    add_number(
        parser,
        "--prior-weight",
        OWN["prior_weight"],
        "weight of prior preservation, which limits forgetting; 0 is off",
        public=PUBLIC["prior_weight"],
    )
    add_number(
        parser,
        "--prior-pictures",
        96,
        "pictures of other prompts to draw first, for prior preservation; none with --thing",
    )
    add(
        "--prior-prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts for --prior-pictures, one per line (default: captions in the words "
        "of the model's vocabulary, none for a model without)",
    )
    add(
        "--validation-prompts",
        nargs="+",
        metavar="PROMPT",
        help="prompts to draw at each checkpoint (default: 4 captions and 2 prior prompts)",
    )
    add(
        "--resolution",
        type=integer(1),
        metavar="PX",
        help="side in pixels of square pictures; others have about as many pixels; only for public "
        "models (default: 512)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the estimate of time and memory, and stop (default: off)",
    )
    args = parser.parse_args(argv)
    if len(args.data) > 1:
        several = " and ".join(map(str, args.data))
        raise UserError(f"--data takes one folder, got {several}: put them into one folder")
    args.data = expanded(args.data[0])
    # A file whose name starts with a dash looks like an option.
    name = args.data.resolve().name.lstrip("-") or "pictures"
    if len(os.fsencode(name)) > MOST_NAME:
        name = slug(name)
    if args.output is not None:
        check_outside("--output", args.output, sources=[args.data])
    args.output = expanded(args.output or Path(f"{name}.safetensors"))
    check_template(args.caption_template)
    given = args.run_dir is not None
    args.run_dir = expanded(args.run_dir or Path("runs") / name)
    # The default ones may be inside: samples have no caption, unless all pictures get one.
    if given or args.caption_template is not None:
        check_outside("--run-dir", args.run_dir, sources=[args.data])
    if not args.dry_run:
        check_run_folder(args.run_dir, "train.lora")
    check_tuning(args)
    _check_thing(args)
    check_at_least(args, 1, "accumulate", "rank")
    check_at_most(args, MOST_RANK, "rank")
    args.alpha = args.rank if args.alpha is None else args.alpha
    check_alpha(args)
    check_at_least(args, 0, "prior_weight", "prior_pictures")
    if args.drop_caption is not None and not 0 <= args.drop_caption < 1:
        raise UserError(f"--drop-caption must be at least 0 and below 1, got {args.drop_caption}")
    check_new_lora(args.output, dry_run=args.dry_run)
    return args


def _check_thing(args: argparse.Namespace) -> None:
    """`UserError` for options that --thing does not take, or --plural without it."""
    if args.thing is None and args.plural is not None:
        raise UserError("--plural is of --thing: give both")
    given = {name: getattr(args, name) for name in ("caption_template", "flip", "prior_prompts")}
    wrong = [option_of(name) for name, value in given.items() if value not in (None, False)]
    if args.thing is not None and wrong:
        raise UserError(f"--thing takes no {' and no '.join(wrong)}: leave it out")


def fill(args: argparse.Namespace, public: TeacherConfig | None) -> None:
    """Set what was not given to the defaults of the model; `UserError` for what it does not take.

    Args:
        public: config of a public model; None for a model of this project.
    """
    if public is None and (args.quantize, args.resolution) != (None, None):
        raise UserError("--quantize and --resolution are for public models: leave them out")
    if public is not None and args.thing is not None:
        raise UserError(f"--thing takes a model with semantic latents, which {public.name} has not")
    defaults = OWN if args.thing is None else OWN | THING
    if public is not None:
        dropped = 0.0 if public.is_distilled else OWN["drop_caption"]
        defaults = PUBLIC | {"targets": PUBLIC_TARGETS[public.kind], "drop_caption": dropped}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.targets = list(args.targets)  # as in the record of a run
    if public is not None:
        check_resolution(args.resolution, public.size_unit)
        check_size(public, args.resolution, args.resolution)
        if args.prior_weight or args.prior_prompts:
            raise UserError("a public model is trained without prior preservation: leave it out")


EPILOG = """
With --thing, one cut-out of the thing (a PNG, transparent around it) is enough, and captions are
ignored.

Captions: a .txt file with the caption beside each picture (cat.png, cat.txt), or one metadata.jsonl
with lines {"file_name": "cat.png", "text": "a cat"}, or a metadata.csv with these columns, or with
--caption-template the names of the subfolders. 10 to 50 pictures of one thing are enough. Use the
same new word for the thing in every caption. Also describe the rest of the picture: you can then
change it in a prompt. Pictures may have any size and shape: the command crops each to the nearest
of a few shapes.

Public models (MiniT2I, Z-Image, FLUX.2 klein, Qwen-Image) are always trained with --save-memory. Of
pictures for MiniT2I, the largest square is used.
"""
