"""Show the default model's training pictures: `python -m train.stickers --output sheet.png`.

Scenes of one to four glyphs of the Noto Color Emoji font on a plain background, with captions in
everyday English (train/data/stickers/). `--pictures FOLDER` takes the pictures of Fluent Emoji in
3D instead, on transparent ground. `--noun` writes an imagefolder of one noun, to try fine-tuning:

    python -m train.stickers --noun zebra --count 20 --output runs/zebra
"""

from collections.abc import Sequence

from tqdm import tqdm

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, plural, run_command
from mlx_snapgen.files import check_new, whole_file
from mlx_snapgen.pictures import contact_sheet
from train.data.stickers.render import (
    INSTALL,
    PICTURES,
    find_font,
    find_pictures,
    glyph_scenes,
    render,
    write_imagefolder,
)
from train.data.stickers.scenes import noun_scene, training_scene, validation_scene
from train.data.stickers.source import add_num_nouns
from train.data.stickers.vocabulary import collection_in
from train.options.common import (
    add_number,
    add_output,
    add_seed,
    check_at_least,
    check_new_file,
    check_outside,
)
from train.options.data import size_pair


def main(argv: Sequence[str] | None = None) -> None:
    """Write a contact sheet, or an imagefolder."""
    parser = Parser(
        prog="python -m train.stickers",
        description="Draw training pictures with the font Noto Color Emoji: a contact sheet with\n"
        "captions, or with --noun a folder for train.lora.",
        epilog=f"To install the font: {INSTALL}. To fetch the pictures: {PICTURES}.",
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
    add_num_nouns(parser, "use the first N nouns only (default: all)")
    add(
        "--size",
        type=size_pair,
        metavar="HxW",
        help="height and width of the pictures in pixels, one of those that --pictures is for "
        "(default: the square)",
    )
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
    add(
        "--pictures",
        metavar="FOLDER",
        help="folder with the pictures of Fluent Emoji in 3D, drawn instead of the font "
        "(default: none)",
    )
    args = parser.parse_args(argv)
    output = args.output
    (check_new if args.noun else check_new_file)(output)
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}; create it first")
    check_outside("--output", output, sources=[args.pictures] if args.pictures else ())
    check_at_least(args, 1, "count")
    check_at_least(args, 0, "seed")
    if args.pictures:
        if args.font:
            raise UserError("--font and --pictures are two sources: give one of them")
        collection = collection_in(find_pictures(args.pictures))
    else:
        find_font(args.font)
        collection = collection_in(None)
    if args.size and args.size not in collection.shapes:
        known = ", ".join(f"{height}x{width}" for height, width in collection.shapes)
        raise UserError(f"--size: no scenes of this size: {known}")
    numbers = range(args.count)
    if args.noun:
        shown = [noun_scene(args.noun, args.seed, k, collection=collection) for k in numbers]
        write_imagefolder(output, shown, args.font)
        print(f"{output}: {plural(len(shown), 'picture')} of a {args.noun}")
        return
    if args.glyphs:
        shown = glyph_scenes(args.num_nouns, collection)
    elif args.validation:
        shown = [
            validation_scene(k, args.num_nouns, collection=collection, size=args.size)
            for k in numbers
        ]
    else:
        shown = [
            training_scene(args.seed, k, args.num_nouns, collection=collection, size=args.size)
            for k in numbers
        ]
    scale = 64 / min(collection.size) if args.glyphs else 1
    bar = tqdm(shown, unit="picture", leave=False)
    pictures = [render(scene, scale, font=args.font) for scene in bar]
    columns = 16 if args.glyphs else min(8, len(pictures))
    sheet = contact_sheet(pictures, [scene.caption for scene in shown], columns)
    with whole_file(output) as partial:
        sheet.save(partial, "PNG")
    print(f"{output}: {plural(len(pictures), 'picture')}")


if __name__ == "__main__":
    run_command(main)
