"""Shared by the commands of `convert`: the output, as a positional argument or as an option."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mlx_snapgen.cli.options import Parser


def add_output(parser: Parser, what: str = "folder to write") -> None:
    """The output, as the last positional argument OUT or as --output; see `parse`."""
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help=f"{what}; must not exist")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="another way to give OUT")


def parse(parser: Parser, argv: Sequence[str] | None = None) -> Namespace:
    """Arguments of a parser with `add_output`; `UserError` unless there is one `output`."""
    args = parser.parse_args(argv)
    if (args.out is None) == (args.output is None):
        parser.error("name the output once, as OUT or with --output")
    args.output = args.output or args.out
    return args
