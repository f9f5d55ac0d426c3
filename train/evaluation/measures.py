"""The evaluation of any model on the held-out pictures of a set: table, results.json, sheets.

The flow validation loss needs nothing else; CLIP score and CMMD compare pictures that are drawn for
the held-out captions with those captions and with the held-out pictures, by a CLIP that the user
names.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.files import whole_file
from mlx_snapgen.networks.clip import Clip
from mlx_snapgen.pictures import contact_sheet, to_uint8
from mlx_snapgen.settings import DrawSettings, Width
from train.data.source import Samples
from train.evaluation.clip_measures import clip_score, cmmd, embed_pictures, embed_texts
from train.evaluation.models import MeasuredModel
from train.evaluation.validation import NUM_LEVELS

COLUMNS = 8
"""Pictures in a row of a sheet, at most."""


@dataclass(frozen=True)
class MeasuredRow:
    """One line of the table; None is not measured.

    Attributes:
        name: a width, or `Measurement.measured_on`.
        validation_losses: see `flow_losses`.
        seconds_per_picture: of drawing, in batches.
    """

    name: str
    validation_losses: list[float] | None = None
    clip_score: float | None = None
    cmmd: float | None = None
    seconds_per_picture: float | None = None


def table(rows: Sequence[MeasuredRow]) -> str:
    """The rows as a markdown table; columns without a number are left out."""
    columns = {
        "validation loss": [r.validation_losses and np.mean(r.validation_losses) for r in rows],
        "CLIP score": [row.clip_score for row in rows],
        "CMMD": [row.cmmd for row in rows],
        "s / picture": [row.seconds_per_picture for row in rows],
    }
    digits = {"validation loss": 4, "CLIP score": 2, "CMMD": 3, "s / picture": 2}
    columns = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    lines = [["", *columns], ["---"] + ["---:"] * len(columns)]
    for i, row in enumerate(rows):
        cells = [(cells[i], digits[name]) for name, cells in columns.items()]
        lines.append([row.name, *("" if c is None else f"{c:.{d}f}" for c, d in cells)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Measurement:
    """How to measure a model.

    Attributes:
        batches: the samples to measure on, all of a batch of one size.
        measured_on: what they are: the name of their row.
        clip: None measures the validation loss alone.
        settings: of the drawings; picture i of the set has the seed `settings.seed` + i.
        prompts: of the sheet; None: the first captions.
        batch_size: pictures to draw at a time.
        output: folder that gets all files; None writes none.
    """

    model: MeasuredModel
    widths: Sequence[Width]
    batches: Sequence[Samples]
    measured_on: str
    clip: Clip | None
    settings: DrawSettings
    prompts: Sequence[str] | None
    batch_size: int
    output: Path | None

    @property
    def count(self) -> int:
        """Number of pictures to measure on."""
        return sum(len(samples.captions) for samples in self.batches)

    def run(self, recorded: dict[str, Any]) -> str:
        """Measure all widths; returns the table.

        Args:
            recorded: settings for results.json.
        """
        losses = self._losses()
        rows = [MeasuredRow(w.name, losses[w.share]) for w in self.widths]
        real = texts = None
        if self.clip is not None:
            captions = [c for samples in self.batches for c in samples.captions]
            texts = embed_texts(self.clip, captions)
            real = self._held_out_embeddings()
            rows.append(MeasuredRow(self.measured_on, clip_score=clip_score(real, texts)))
        self._write_results(rows, recorded)
        if self.output:
            self._plot(losses)
            self._sheet()
        for i, width in enumerate(self.widths if real is not None else ()):
            assert real is not None and texts is not None
            drawn, seconds = self._drawn_embeddings(width)
            rows[i] = replace(
                rows[i],
                clip_score=clip_score(drawn, texts),
                cmmd=cmmd(drawn, real),
                seconds_per_picture=seconds,
            )
            self._write_results(rows, recorded)
        return table(rows)

    def _losses(self) -> dict[float, list[float]]:
        shares = [width.share for width in self.widths]
        with picture_bar(self.count, "validation loss") as progress:
            return self.model.losses(self.batches, shares, progress=progress)

    def _decoded(self, samples: Samples) -> np.ndarray:
        return to_uint8(self.model.autoencoder.decode(samples.latents))

    def _held_out_embeddings(self) -> np.ndarray:
        assert self.clip is not None
        found = []
        with picture_bar(self.count, f"CLIP: {self.measured_on}") as progress:
            for samples in self.batches:
                found.append(embed_pictures(self.clip, list(self._decoded(samples))))
                progress(len(samples.captions))
        return np.concatenate(found)

    def _drawn_embeddings(self, width: Width) -> tuple[np.ndarray, float]:
        """Embeddings of one picture for each held-out caption, and seconds per picture."""
        assert self.clip is not None
        found, seconds, first = [], 0.0, self.settings.seed or 0
        with picture_bar(self.count, width.name) as progress:
            for samples in self.batches:
                started = time.perf_counter()
                pictures = self.model.draw(
                    samples.captions,
                    seeds=range(first, first + len(samples.captions)),
                    settings=self._sized(samples),
                    share=width.share,
                    batch_size=self.batch_size,
                    progress=progress,
                )
                seconds += time.perf_counter() - started
                first += len(pictures)
                found.append(embed_pictures(self.clip, list(pictures)))
        return np.concatenate(found), seconds / self.count

    def _sized(self, samples: Samples) -> DrawSettings:
        """The settings for pictures of the size of some samples."""
        factor = self.model.config.autoencoder.downsampling
        height, width = (factor * side for side in samples.latents.shape[1:3])
        return replace(self.settings, height=height, width=width, force_size=True)

    # --- files ---

    def _write_results(self, rows: Sequence[MeasuredRow], recorded: dict[str, Any]) -> None:
        if self.output is None:
            return
        levels = [(k + 0.5) / NUM_LEVELS for k in range(NUM_LEVELS)]
        results = {
            "settings": recorded,
            "pictures": self.count,
            "measured_on": self.measured_on,
            "held_out_pictures": "decoded latents",
            "noise_levels": levels,
            "rows": [asdict(row) for row in rows],
        }
        for name, text in (
            ("table.md", table(rows)),
            ("results.json", json.dumps(results, indent=1)),
        ):
            with whole_file(self.output / name) as partial:
                partial.write_text(text, encoding="utf-8")

    def _plot(self, losses: dict[float, list[float]]) -> None:
        """losses.png: the loss of each width over the noise level."""
        try:
            # Imported here because it is slow and optional.
            from matplotlib.figure import Figure
        except ImportError:
            tqdm.write("no losses.png without matplotlib: pip install matplotlib", sys.stderr)
            return
        assert self.output is not None
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        levels = [(k + 0.5) / NUM_LEVELS for k in range(NUM_LEVELS)]
        for width in self.widths:
            mean = np.mean(losses[width.share])
            label = f"{width.name}, mean {mean:.4f}"
            axes.plot(levels, losses[width.share], marker=".", label=label)
        axes.set_xlabel("noise level t")
        axes.set_ylabel("validation loss")
        axes.grid(alpha=0.3)
        axes.legend()
        with whole_file(self.output / "losses.png") as partial:
            figure.savefig(partial, format="png", dpi=80)

    def _sheet(self) -> None:
        """sheet.png: fixed prompts, one row per width; of held-out captions the pictures too."""
        assert self.output is not None
        rows: list[np.ndarray] = []
        labels: list[str] = []
        settings = self.settings
        prompts = list(self.prompts or ())
        if not prompts:
            # Of the widest shape there may be few.
            samples = max(self.batches, key=lambda batch: len(batch.captions))
            prompts, settings = samples.captions[:COLUMNS], self._sized(samples)
            rows.append(self._decoded(replace(samples, latents=samples.latents[:COLUMNS])))
            labels += [f"{self.measured_on}: {prompt}" for prompt in prompts]
        first = self.settings.seed or 0
        total = len(self.widths) * len(prompts)
        with picture_bar(total, "sheet") as progress:
            for width in self.widths:
                rows.append(
                    self.model.draw(
                        prompts,
                        seeds=range(first, first + len(prompts)),
                        settings=settings,
                        share=width.share,
                        batch_size=self.batch_size,
                        progress=progress,
                    )
                )
                labels += [f"{width.name}: {prompt}" for prompt in prompts]
        sheet = contact_sheet(list(np.concatenate(rows)), labels, columns=len(prompts))
        with whole_file(self.output / "sheet.png") as partial:
            sheet.save(partial, format="png")
