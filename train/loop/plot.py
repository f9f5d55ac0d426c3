"""The curves of a run: `loss.png` beside its log."""

import sys
from pathlib import Path

from mlx_snapgen.files import whole_file
from train.loop.checkpoint import LOG, read_log

PLOT = "loss.png"
HIDDEN = {"step", "time", "seconds_per_step"}
_told = False


def is_plotted(run_dir: Path) -> bool:
    """Whether the curves are as new as the log."""
    try:
        return (run_dir / PLOT).stat().st_mtime_ns >= (run_dir / LOG).stat().st_mtime_ns
    except OSError:
        return False


def plot_log(run_dir: Path) -> Path | None:
    """Draw every metric of `log.jsonl` over the steps into `loss.png`.

    Returns:
        The picture's path; None when nothing is logged yet or matplotlib is not installed.
    """
    global _told
    try:
        # Imported here because it is slow and optional.
        from matplotlib.figure import Figure
    except ImportError:
        if not _told:
            print("no loss.png without matplotlib: pip install matplotlib", file=sys.stderr)
        _told = True
        return None
    log = read_log(run_dir)
    names = list(dict.fromkeys(k for entry in log for k in entry if k not in HIDDEN))
    if not names:
        return None
    figure = Figure(figsize=(8, 1 + 1.8 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axes.set_title(name, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
        if min(value for _, value in points) > 0:
            axes.set_yscale("log")
    rows[-1].set_xlabel("step")
    path = run_dir / PLOT
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)
    return path
