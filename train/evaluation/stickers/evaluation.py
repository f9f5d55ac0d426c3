"""The evaluation of a sticker model: tables, results.json and contact sheets."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_snapgen.checkpoint.model import FEW_STEP, Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.files import whole_file
from mlx_snapgen.lora.adapters import lora_weights
from mlx_snapgen.pictures import contact_sheet
from mlx_snapgen.settings import DrawSettings, Width
from train.data.stickers.source import ValidationStickers, draw_scenes
from train.data.stickers.vocabulary import Collection, collection_in
from train.evaluation.reconstruction import reconstruct
from train.evaluation.stickers.geneval import Prompt, fixed_prompts
from train.evaluation.stickers.report import Row, make_row, marked_picture, table
from train.evaluation.stickers.score import draw, gallery_prompts, judge, noun_prompts
from train.evaluation.validation import validation_losses, validation_set

GALLERY, COLUMNS = 40, 10  # pictures of the gallery, and in a row of any contact sheet


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate a model.

    Attributes:
        num_nouns: nouns of the model.
        pictures: folder of the collection's pictures; None for the font.
        output: folder that gets all files; None writes none.
        ceilings: whether to score rendered scenes, directly and through the autoencoder, as well.
    """

    components: Components
    widths: Sequence[Width]
    settings: DrawSettings
    num_nouns: int
    pictures: Path | None
    per_category: int
    batch_size: int
    output: Path | None
    ceilings: bool

    @property
    def collection(self) -> Collection:
        """The things of the prompts."""
        return collection_in(self.pictures)

    def _draw(self, prompts: Sequence[Prompt], width: Width) -> list[np.ndarray]:
        return draw(
            self.components,
            prompts,
            settings=self.settings,
            share=width.share,
            name=width.name,
            batch_size=self.batch_size,
        )

    def _ceilings(self, prompts: Sequence[Prompt]) -> Iterator[tuple[str, list[np.ndarray]]]:
        if self.ceilings:
            sizes = itertools.groupby(prompts, key=lambda prompt: prompt.scene.size)
            truth = [draw_scenes([p.scene for p in group])[0] for _, group in sizes]
            yield "rendered scenes", list(itertools.chain(*truth))
            decoded = [reconstruct(self.components.autoencoder, group) for group in truth]
            yield "reconstructed scenes", list(itertools.chain(*decoded))

    def _sheet(
        self,
        name: str,
        pictures: Sequence[np.ndarray],
        *,
        correct: Sequence[bool],
        texts: Sequence[str],
    ) -> None:
        if self.output:
            marked = [marked_picture(p, ok) for p, ok in zip(pictures, correct, strict=True)]
            sheet = contact_sheet(marked, texts, COLUMNS)
            with whole_file(self.output / f"{name.replace(' ', '_')}.png") as partial:
                sheet.save(partial, "PNG")

    def _write(self, name: str, text: str) -> None:
        if self.output:
            with whole_file(self.output / name) as partial:
                partial.write_text(text)

    def scores(self, recorded: dict[str, Any], *, validation_scenes: int) -> str:
        """A table of accuracies and validation losses.

        The files in the output folder are updated after every row.

        Args:
            recorded: settings for results.json.
        """
        prompts = fixed_prompts(self.per_category, self.num_nouns, collection=self.collection)
        source = ValidationStickers(self.num_nouns, self.pictures)
        data = validation_set(self.components, source, count=validation_scenes)
        few_step = self.components.config.few_step
        on = bool(self.settings.resolved(self.components.config).few_step)
        adapters = {} if few_step is None else {FEW_STEP: float(on)}
        rows: list[Row] = []

        def finish(name: str, pictures: list[np.ndarray], **measured: Any) -> None:
            row = make_row(
                name,
                prompts,
                pictures,
                num_nouns=self.num_nouns,
                collection=self.collection,
                **measured,
            )
            rows.append(row)
            self._write("table.md", table(rows))
            results = {"settings": recorded, "rows": [asdict(row) for row in rows]}
            self._write("results.json", json.dumps(results, indent=1))
            correct = [judged["correct"] for judged in row.judged]
            self._sheet(name, pictures, correct=correct, texts=[p.text for p in prompts])

        for width in self.widths:
            started = time.perf_counter()
            pictures = self._draw(prompts, width)
            seconds = (time.perf_counter() - started) / len(prompts)
            with (
                picture_bar(validation_scenes, f"{width.name}: validation loss") as progress,
                lora_weights(self.components.transformer, adapters),
            ):
                losses = validation_losses(
                    self.components, data, share=width.share, progress=progress
                )
            finish(width.name, pictures, losses=losses, seconds=seconds)
        for name, pictures in self._ceilings(prompts):
            finish(name, pictures)
        return table(rows)

    def noun(self, noun: str) -> str:
        """A table: the share of correct pictures of a noun."""
        prompts = noun_prompts(noun, self.per_category, collection=self.collection)
        lines = [f"| | {noun} |", "| --- | ---: |"]

        def finish(name: str, pictures: list[np.ndarray]) -> None:
            correct, _ = judge(
                prompts,
                pictures,
                num_nouns=self.num_nouns,
                also=noun,
                collection=self.collection,
            )
            share = float(np.mean(correct))
            error = np.sqrt(share * (1 - share) / len(prompts))
            lines.append(f"| {name} | {share:.3f} ± {error:.3f} |")
            self._sheet(name, pictures, correct=correct, texts=[p.text for p in prompts])
            self._write("table.md", "\n".join(lines) + "\n")

        for width in self.widths:
            finish(width.name, self._draw(prompts, width))
        for name, pictures in self._ceilings(prompts):
            finish(name, pictures)
        return "\n".join(lines) + "\n"

    def gallery(self, path: Path) -> None:
        """A contact sheet of single objects, drawn with the first width."""
        texts = gallery_prompts(GALLERY, self.num_nouns, collection=self.collection)
        first = self.settings.seed or 0
        with picture_bar(len(texts), "gallery", leave=True) as progress:
            pictures = draw_pictures(
                self.components,
                texts,
                seeds=range(first, first + len(texts)),
                settings=self.settings,
                share=self.widths[0].share,
                batch_size=self.batch_size,
                progress=progress,
            )
        with whole_file(path) as partial:
            contact_sheet(list(pictures), texts, COLUMNS).save(partial, "PNG")
