"""Show training pictures of stickers: `python -m train.stickers --output sheet.png`.

Scenes of one to four glyphs of the Noto Color Emoji font on a plain background, with captions in
everyday English (train/data/stickers/). `--pictures FOLDER` takes the pictures of Fluent Emoji in
3D instead, on transparent ground. `--noun` writes an imagefolder of one noun, and `--cut-out` its
picture alone, to try fine-tuning:

    python -m train.stickers --noun castle --cut-out --output runs/castle
"""

from collections.abc import Sequence

from tqdm import tqdm

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, plural, run_command
from mlx_snapgen.files import check_new, whole_file
from mlx_snapgen.pictures import contact_sheet
from mlx_snapgen.vocabulary import with_article
from train.data.stickers.render import (
    INSTALL,
    PICTURES,
    find_font,
    find_pictures,
    glyph_scenes,
    render,
    write_cutout,
    write_imagefolder,
)
from train.data.stickers.scenes import find_noun, noun_scene, training_scene, validation_scene
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
    add(
        "--cut-out",
        action="store_true",
        help="write one picture into the folder: the noun alone on transparent ground, for "
        "train.lora --thing (default: off)",
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
    if args.cut_out and not args.noun:
        raise UserError("--cut-out is the picture of one noun: add --noun")
    of_sheets = {"--glyphs": args.glyphs, "--validation": args.validation, "--size": args.size}
    for option in (option for option, given in of_sheets.items() if given and args.noun):
        raise UserError(f"--noun takes no {option}: leave it out")
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
    if args.cut_out:
        noun = find_noun(args.noun, collection)
        write_cutout(output, noun, args.font, collection=collection)
        print(f"{output}: a picture of {with_article(noun.name)}, cut out")
        return
    if args.noun:
        shown = [noun_scene(args.noun, args.seed, k, collection=collection) for k in numbers]
        write_imagefolder(output, shown, args.font)
        print(f"{output}: {plural(len(shown), 'picture')} of {with_article(args.noun)}")
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
