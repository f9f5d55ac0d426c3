"""Look at the default model's training pictures: `python -m train.stickers --output sheet.png`.

Scenes of one to four glyphs of the Noto Color Emoji font on a plain background, with captions in
everyday English (train/data/stickers/). With `--noun` an imagefolder of one noun, to try
fine-tuning on:

    python -m train.stickers --noun zebra --count 20 --output runs/zebra
"""

import argparse
from pathlib import Path

from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.pictures import contact_sheet
from train.data.stickers.render import (
    INSTALL,
    glyph_scenes,
    render,
    write_imagefolder,
)
from train.data.stickers.scenes import (
    SIDE,
    noun_scene,
    training_scene,
    validation_scenes,
)
from train.data.stickers.vocabulary import NOUNS


def main(argv: list[str] | None = None) -> None:
    """Write a contact sheet, or an imagefolder."""
    parser = argparse.ArgumentParser(
        prog="python -m train.stickers",
        description="Look at the training pictures: a contact sheet of captioned scenes, drawn "
        "from the Noto Color Emoji font.",
        epilog=f"The font is installed by {INSTALL}.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="PNG file to write, or with --noun a folder; must not exist yet",
    )
    parser.add_argument(
        "--noun",
        metavar="NAME",
        help="write a folder of pictures of this noun alone and a metadata.jsonl with captions",
    )
    parser.add_argument(
        "--count", type=int, default=64, help="how many scenes to show (default 64)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the scenes, as in training (default 0)"
    )
    parser.add_argument(
        "--num-nouns",
        type=int,
        metavar="N",
        help=f"use the first N nouns (default: all {len(NOUNS)})",
    )
    parser.add_argument(
        "--glyphs",
        action="store_true",
        help="show every noun once, and in every colour it can have, instead of scenes",
    )
    parser.add_argument(
        "--validation",
        action="store_true",
        help="show the validation scenes instead; every fourth is a held-out combination",
    )
    parser.add_argument("--font", metavar="TTF", help="NotoColorEmoji.ttf, if in no usual place")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists; choose another --output or remove it")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; create it first")
    if args.count < 1:
        raise UserError(f"--count is {args.count}; it must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative")
    if args.noun:
        shown = [noun_scene(args.noun, args.seed, k) for k in range(args.count)]
        write_imagefolder(output, shown, args.font)
        print(f"{output}: {len(shown)} pictures of one noun")
        return
    if args.glyphs:
        shown = glyph_scenes(args.num_nouns)
    elif args.validation:
        shown = validation_scenes(args.count, args.num_nouns)
    else:
        shown = [training_scene(args.seed, k, args.num_nouns) for k in range(args.count)]
    size = 64 if args.glyphs else SIDE
    pictures = [render(scene, size, args.font) for scene in shown]
    columns = 16 if args.glyphs else min(8, len(pictures))
    contact_sheet(pictures, [scene.caption for scene in shown], columns).save(output, "PNG")
    print(f"{output}: {len(pictures)} pictures")


if __name__ == "__main__":
    run_command(main)
