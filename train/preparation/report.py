"""What people read about a prepared set: report.json, skipped.jsonl, sizes.png and sheet.png."""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.picture_files import Size
from mlx_snapgen.pictures import contact_sheet, to_uint8
from train.data.shards import TRAIN, VALIDATION, Shard, cannot_write, group_name, shard_path

SIDE_BINS = 2 ** np.arange(4, 15.25, 0.25)
ASPECT_BINS = 2 ** np.arange(-3, 3.125, 0.125)
ON_SHEET = 24
MARGIN = 4


@dataclass
class Counts:
    """Counts over all shards.

    Attributes:
        kept: bucket -> samples for training, samples for validation.
        skipped: reason -> records.
        changed: what was changed in pictures that were kept -> pictures.
        sides, aspects: histograms of the shorter side in pixels and of width / height.
        bytes: of all shards.
    """

    kept: dict[Size, list[int]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIDE_BINS) - 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECT_BINS) - 1, np.int64))
    bytes: int = 0

    @property
    def total(self) -> int:
        """Pictures that were kept."""
        return sum(map(sum, self.kept.values()))

    def values(self) -> dict[str, Any]:
        """JSON values for report.json."""
        return {
            "read": self.total + self.skipped.total(),
            "kept": self.total,
            "training": sum(train for train, _ in self.kept.values()),
            "validation": sum(validation for _, validation in self.kept.values()),
            "skipped": dict(sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))),
            "changed": dict(sorted(self.changed.items(), key=lambda item: (-item[1], item[0]))),
            "buckets": {f"{w}x{h}": sum(n) for (h, w), n in self.kept.items() if sum(n)},
            "bytes": self.bytes,
        }


def count_shards(folder: Path, *, chunks: int, buckets: Sequence[Size]) -> Counts:
    """Read the counts of all shards, and write skipped.jsonl.

    Raises:
        UserError: a shard is missing or damaged, or the file cannot be written.
    """
    counts = Counts({size: [0, 0] for size in buckets})
    path = folder / "skipped.jsonl"
    try:
        with (
            whole_file(path) as partial,
            open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            for chunk in range(chunks):
                with Shard(shard_path(folder, chunk)) as shard:
                    _add(counts, shard, write=file.write)
    except OSError as error:
        raise cannot_write(path, error) from None
    return counts


def _add(counts: Counts, shard: Shard, *, write: Callable[[str], Any]) -> None:
    counts.bytes += shard.path.stat().st_size
    for size, kept in counts.kept.items():
        for i, part in enumerate((TRAIN, VALIDATION)):
            kept[i] += shard.count(group_name(part, size))
    for line in shard.json_lines("skipped"):
        counts.skipped[str(line.get("reason"))] += 1
        write(json.dumps(line, ensure_ascii=False) + "\n")
    for line in shard.json_lines("changed"):
        counts.changed.update(line)
    sizes = shard.rows("sizes")
    if len(sizes):
        counts.sides += np.histogram(_inside(sizes.min(1), SIDE_BINS), SIDE_BINS)[0]
        aspects = _inside(sizes[:, 1] / sizes[:, 0], ASPECT_BINS)
        counts.aspects += np.histogram(aspects, ASPECT_BINS)[0]


def _inside(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Values outside the bins are counted in the first and the last."""
    return np.clip(values, bins[0], bins[-1])


def plot_sizes(counts: Counts, path: Path) -> None:
    """Histograms of the pictures' sizes; a line on stderr if matplotlib is not installed."""
    try:
        # Imported here because it is slow and optional.
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name} without matplotlib: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    plots = [
        ("shorter side, pixels", SIDE_BINS, counts.sides),
        ("width / height", ASPECT_BINS, counts.aspects),
    ]
    rows = figure.subplots(len(plots), squeeze=False)[:, 0]
    for axes, (name, bins, numbers) in zip(rows, plots, strict=True):
        axes.stairs(numbers, bins, fill=True)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"pictures by {name}", fontsize=9, loc="left")
        axes.grid(alpha=0.3)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


@dataclass(frozen=True)
class Shown:
    """A sample on the sheet."""

    key: str
    caption: str
    size: Size
    latents: np.ndarray


def choose_shown(folder: Path, *, chunks: int, buckets: Sequence[Size], column: str) -> list[Shown]:
    """The first samples of each bucket in the first shard that has any, if possible to train on."""
    for part, chunk in itertools.product((TRAIN, VALIDATION), range(chunks)):
        with Shard(shard_path(folder, chunk)) as shard:
            groups = [(group_name(part, size), size) for size in buckets]
            groups = [(group, size) for group, size in groups if shard.count(group)]
            rounds = max((shard.count(group) for group, _ in groups), default=0)
            places = (
                (row, group, size)
                for row in range(rounds)
                for group, size in groups
                if row < shard.count(group)
            )
            shown = []
            for row, group, size in places:
                caption = shard.text(f"{group}/captions/{column}", row)
                latents = shard.rows(f"{group}/latents", row, row + 1)
                shown.append(Shown(shard.text(f"{group}/keys", row), caption, size, latents))
                if len(shown) == ON_SHEET:
                    break
            if shown:
                return shown
    return []


def sheet(
    shown: Iterable[Shown], originals: Mapping[str, np.ndarray], autoencoder: Autoencoder
) -> Image.Image:
    """Decoded samples, each to the right of its original where there is one.

    Args:
        originals: key -> pixels (H, W, 3) of the sample's size.
    """
    shown = list(shown)
    side = max(max(sample.size) for sample in shown)
    cells = []
    for sample in shown:
        latents = mx.array(sample.latents.astype(np.float32))
        decoded = to_uint8(autoencoder.decode(latents))[0]
        pair = [originals[sample.key]] if sample.key in originals else []
        cells.append(np.concatenate([_square(x, side) for x in [*pair, decoded]], 1))
    width = max(cell.shape[1] for cell in cells)
    cells = [
        np.pad(c, ((0, 0), (width - c.shape[1], 0), (0, 0)), constant_values=245) for c in cells
    ]
    return contact_sheet(cells, [sample.caption or "(no caption)" for sample in shown], 4)


def _square(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture in the middle of a square, and a margin on the right."""
    out = np.full((side, side + MARGIN, 3), 245, np.uint8)
    top, left = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
    out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return out
