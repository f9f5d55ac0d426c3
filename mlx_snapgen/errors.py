"""Errors: one line and exit code 2 for a user's mistake, a traceback for a bug."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" with the known name closest to `name`, or ""."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (did you mean '{match[0]}'?)" if match else ""


def _end_bars() -> None:
    """End the bars that an error has left on the terminal, so that its line stands alone."""
    if (tqdm := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0, its own code, 2 after a `UserError`, 130 after Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        _end_bars()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _end_bars()
        print("interrupted", file=sys.stderr)
        sys.exit(130)
