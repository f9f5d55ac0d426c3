"""Show the default model's training pictures: `python -m train.stickers --output sheet.png`.

Scenes of one to four glyphs of the Noto Color Emoji font on a plain background, with captions in
everyday English (train/data/stickers/). `--noun` writes an imagefolder of one noun, to try
fine-tuning:

    python -m train.stickers --noun zebra --count 20 --output runs/zebra
"""

from collections.abc import Sequence

from tqdm import tqdm

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.pictures import contact_sheet
from train.data.stickers.render import INSTALL, find_font, glyph_scenes, render, write_imagefolder
from train.data.stickers.scenes import SIDE, noun_scene, training_scene, validation_scene
from train.data.stickers.source import add_num_nouns
from train.data.stickers.vocabulary import NOUNS
from train.options.common import add_number, add_output, add_seed, check_at_least, check_new


def main(argv: Sequence[str] | None = None) -> None:
    """Write a contact sheet, or an imagefolder."""
    parser = Parser(
        prog="python -m train.stickers",
        description="Draw training pictures with the font Noto Color Emoji: a contact sheet with\n"
        "captions, or with --noun a folder for train.lora.",
        epilog=f"To install the font: {INSTALL}.",
    )
    add = parser.add_argument
    add_output(parser, "PNG file to write, or folder with --noun")
    add(
        "--noun",
        metavar="NAME",
        help="write a folder with pictures of this noun and their captions in metadata.jsonl "
        "(default: none, write a contact sheet)",
    )
    add_number(parser, "--count", 64, "number of scenes")
    add_seed(parser)
    add_num_nouns(parser, f"use the first N nouns only (default: all {len(NOUNS)})")
    add(
        "--glyphs",
        action="store_true",
        help="draw every noun, in each possible color (default: off)",
    )
    add(
        "--validation",
        action="store_true",
        help="draw validation scenes; each fourth is a combination that training leaves out "
        "(default: off)",
    )
    add("--font", metavar="TTF", help="path of NotoColorEmoji.ttf (default: in a font folder)")
    args = parser.parse_args(argv)
    output = args.output
    check_new(output)
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; create it first")
    check_at_least(args, 1, "count")
    check_at_least(args, 0, "seed")
    find_font(args.font)
    numbers = range(args.count)
    if args.noun:
        shown = [noun_scene(args.noun, args.seed, k) for k in numbers]
        write_imagefolder(output, shown, args.font)
        print(f"{output}: {len(shown)} pictures of a {args.noun}")
        return
    if args.glyphs:
        shown = glyph_scenes(args.num_nouns)
    elif args.validation:
        shown = [validation_scene(k, args.num_nouns) for k in numbers]
    else:
        shown = [training_scene(args.seed, k, args.num_nouns) for k in numbers]
    size = 64 if args.glyphs else SIDE
    bar = tqdm(shown, unit="picture", leave=False)
    pictures = [render(scene, size, font=args.font) for scene in bar]
    columns = 16 if args.glyphs else min(8, len(pictures))
    sheet = contact_sheet(pictures, [scene.caption for scene in shown], columns)
    with whole_file(output) as partial:
        sheet.save(partial, "PNG")
    print(f"{output}: {len(pictures)} pictures")


if __name__ == "__main__":
    run_command(main)
