"""Open the window: `python -m apps.desktop`."""

import signal
from pathlib import Path

from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_writable


def main() -> int:
    """Run until the window closes."""
    from apps.desktop.settings import data_folder

    parser = Parser(prog="python -m apps.desktop", description="Draw pictures in a window.")
    parser.add_argument(
        "picture",
        nargs="?",
        type=Path,
        metavar="PNG",
        help="show this PNG and reuse the settings stored in it (default: no PNG)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=data_folder(),
        metavar="DIR",
        help="folder where the window stores its settings and pictures (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.data != parser.get_default("data"):
        check_writable(args.data)
    try:
        import tkinter

        from apps.desktop.window import Window
    except ImportError as error:
        raise UserError(
            f"this Python has no tkinter ({error}): install python-tk (Homebrew) or python3-tk "
            "(Debian)"
        ) from None
    try:
        window = Window(args.data)
    except tkinter.TclError as error:
        raise UserError(f"no window can be opened: {error}") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: window.close_soon())
    if args.picture is not None:
        window.pictures.open_picture(args.picture)
    window.mainloop()
    return 0


# The worker's process imports this module again.
if __name__ == "__main__":
    run_command(main)
