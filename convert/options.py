"""Options that commands of `convert` share."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mlx_snapgen.cli.options import Parser, bits


def add_output(parser: Parser, what: str = "folder to write") -> None:
    """The output, as the last positional argument OUT or as --output; see `parse`."""
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help=f"{what}; must not exist")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="another way to give OUT")


def add_quantize(parser: Parser, what: str, *, known: Sequence[int] = (4, 8)) -> None:
    """`--quantize`, the bits per weight of `what`; 0 for none."""
    parser.add_argument(
        "--quantize",
        type=bits(*known),
        default=0,
        metavar="BITS",
        help=f"bits per weight of {what}, {', '.join(map(str, known))} or none (default: none)",
    )


def parse(parser: Parser, argv: Sequence[str] | None = None) -> Namespace:
    """Arguments of a parser with `add_output`; `UserError` unless there is one `output`."""
    args = parser.parse_args(argv)
    if (args.out is None) == (args.output is None):
        parser.error("name the output once, as OUT or with --output")
    args.output = args.output or args.out
    return args
