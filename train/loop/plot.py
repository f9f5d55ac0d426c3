"""The curves of a run: `loss.png` beside its log."""

import math
import re
import sys
from pathlib import Path

from mlx_snapgen.files import whole_file
from mlx_snapgen.settings import WIDTHS
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
    """Draw every metric of `log.jsonl` over the steps into `loss.png`; see `panel_of`.

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
    panels: dict[str, list[str]] = {}
    for name in dict.fromkeys(k for entry in log for k in entry if k not in HIDDEN):
        panels.setdefault(panel_of(name), []).append(name)
    if not panels:
        return None
    figure = Figure(figsize=(8, 1 + 2 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (panel, names) in zip(rows, panels.items(), strict=True):
        lowest, highest = math.inf, -math.inf
        for name in names:
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            marker = "." if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), marker=marker, label=shown_name(name))
            lowest = min(lowest, *(value for _, value in points))
            highest = max(highest, *(value for _, value in points))
        axes.set_title(panel, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
        if lowest > 0 and highest > 3 * lowest:
            axes.set_yscale("log", subs=[2, 5])
            for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                which("{x:g}")
    rows[-1].xaxis.get_major_locator().set_params(integer=True)
    rows[-1].set_xlabel("step")
    path = run_dir / PLOT
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)
    return path


def shown_name(name: str) -> str:
    """A metric as the bar and the curves show it: `loss_0.375` of the log is `loss_tiny`."""
    start, _, end = name.rpartition("_")
    found = [w.name for w in WIDTHS if end in (f"{w.share:g}", f"{round(1000 * w.share)}")]
    return f"{start}_{found[0]}" if start and found else name


def panel_of(name: str) -> str:
    """The panel of a metric: those of all widths share one."""
    return re.sub(r"_(\d[\d.]*|full|small|tiny)$", "", name)
