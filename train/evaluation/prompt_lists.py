"""Pictures of the prompts of GenEval and DPG-Bench, in the layout that their own scorers read.

The scorers need networks that are not part of this project: they run in their own environments.
Files that exist are kept, so that an interrupted run resumes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_snapgen.alpha import straight
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.errors import UserError
from mlx_snapgen.files import check_new, expanded, whole_file
from mlx_snapgen.reading import parse_json, read_object, read_text
from mlx_snapgen.settings import DrawSettings
from train.evaluation.models import MeasuredModel
from train.loop.config import changed

SETTINGS = "settings.json"
PROMPTS = "prompts"
"""Setting: `PromptFiles.digest`."""


@dataclass(frozen=True)
class ListedFile:
    """A picture file of a list.

    Attributes:
        path: relative to the output folder.
        prompt: of all pictures in the file.
        seeds: one for each picture; several are a grid of two columns, row by row.
    """

    path: str
    prompt: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PromptFiles:
    """What to write for a list of prompts.

    Attributes:
        files: the pictures.
        texts: path of a text file -> its contents.
        scorer: how to score the folder {output}, for pictures of {side} pixels.
    """

    files: list[ListedFile]
    texts: Mapping[str, str]
    scorer: str

    @property
    def digest(self) -> str:
        """A hash of the prompts, the same for more pictures of each."""
        prompts = [*dict.fromkeys(file.prompt for file in self.files)]
        text = json.dumps([prompts, dict(self.texts)])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def geneval_files(path: Path, *, per_prompt: int, seed: int) -> PromptFiles:
    """The layout of GenEval (arXiv 2310.11513), from its evaluation_metadata.jsonl.

    A folder for each line, 00000/metadata.jsonl with that line and 00000/samples/0000.png ...: what
    evaluation/evaluate_images.py of github.com/djghosh13/geneval reads (its README, "The generated
    format"). As with its own generation/diffusers_generate.py, the seeds are the same for every
    prompt.

    Args:
        path: JSON lines with "tag", "include" and "prompt".

    Raises:
        UserError: no such file, or a line without these keys.
    """
    files, texts = [], {}
    for number, line in enumerate(_lines(path)):
        try:
            values = parse_json(line, path)
            prompt = values["prompt"]
            if not isinstance(prompt, str) or not {"tag", "include"} <= values.keys():
                raise ValueError
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number + 1}: expected the keys tag, include and prompt of "
                f"GenEval's evaluation_metadata.jsonl, got {line[:60]}"
            ) from None
        texts[f"{number:05}/metadata.jsonl"] = line + "\n"
        files += [
            ListedFile(f"{number:05}/samples/{k:04}.png", prompt, (seed + k,))
            for k in range(per_prompt)
        ]
    if not files:
        raise UserError(f"{path} has no prompts")
    scorer = (
        "python evaluation/evaluate_images.py {output} --outfile results.jsonl --model-path "
        "DETECTOR, then python evaluation/summary_scores.py results.jsonl"
    )
    return PromptFiles(files, texts, scorer)


DPG_PICTURES = 4
"""Pictures of a prompt; the scorer cuts a file into a grid of 2 x 2."""


def dpg_files(folder: Path, *, seed: int) -> PromptFiles:
    """The layout of DPG-Bench (arXiv 2403.05135), from its folder of prompts.

    For each NAME.txt a picture images/NAME.png, a grid of 2 x 2 squares: what
    dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA reads, which takes the side of
    a square as its --resolution and a file's name up to the first dot as the prompt's key.

    Raises:
        UserError: no such folder, an empty file, or a name with a further dot.
    """
    folder = expanded(folder)
    paths = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} has no prompts: give DPG-Bench's folder of .txt files")
    files = []
    for path in paths:
        prompt = " ".join(" ".join(_lines(path)).split())
        if not prompt:
            raise UserError(f"{path} is empty")
        if "." in path.stem:
            raise UserError(f"{path}: the scorer reads names up to the first dot, rename the file")
        seeds = tuple(range(seed, seed + DPG_PICTURES))
        files.append(ListedFile(f"images/{path.stem}.png", prompt, seeds))
    return PromptFiles(files, {}, "bash dpg_bench/dist_eval.sh {output}/images {side}")


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty."""
    lines = read_text(expanded(path)).split("\n")
    return [line.strip() for line in lines if line.strip()]


def claim_folder(output: Path, recorded: Mapping[str, Any]) -> None:
    """Record the settings of a list's pictures; `UserError` if the folder has other pictures.

    Args:
        recorded: JSON values.
    """
    path = output / SETTINGS
    if path.is_file():
        then = read_object(path, paths=True)
        # Earlier versions did not record the prompts.
        known = [name for name in recorded if name != PROMPTS or name in then]
        if different := changed(then, recorded, known):
            raise UserError(
                f"{output} has pictures with other {' and '.join(different)}: choose another "
                "--output or delete it"
            )
    else:
        check_new(output)
    _write(path, json.dumps(recorded, indent=1))


def _write(path: Path, text: str) -> None:
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def draw_files(
    model: MeasuredModel,
    listed: PromptFiles,
    *,
    output: Path,
    settings: DrawSettings,
    share: float = 1.0,
    batch_size: int = 16,
) -> int:
    """Draw the files that `output` does not have yet; returns their number.

    Raises:
        UserError: a file cannot be written, or as `draw_pictures`.
    """
    for name, text in listed.texts.items():
        if not (output / name).is_file():
            _write(output / name, text)
    missing = [file for file in listed.files if not (output / file.path).is_file()]
    total, left = (sum(len(f.seeds) for f in files) for files in (listed.files, missing))
    with picture_bar(total, "drawing", initial=total - left, leave=True) as progress:
        for files in _batches(missing, batch_size):
            pictures = model.draw(
                [file.prompt for file in files for _ in file.seeds],
                seeds=[seed for file in files for seed in file.seeds],
                settings=settings,
                share=share,
                batch_size=batch_size,
                progress=progress,
            )
            for file in files:
                own, pictures = pictures[: len(file.seeds)], pictures[len(file.seeds) :]
                _save(output / file.path, own)
    return len(missing)


def _batches(files: Sequence[ListedFile], size: int) -> Iterator[list[ListedFile]]:
    """Files with together `size` pictures, or a single file with more."""
    batch: list[ListedFile] = []
    for file in files:
        batch.append(file)
        if sum(len(f.seeds) for f in batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def _save(path: Path, pictures: np.ndarray) -> None:
    if len(pictures) > 1:
        rows = [np.concatenate(list(pictures[k : k + 2]), 1) for k in range(0, len(pictures), 2)]
        pictures = np.concatenate(rows, 0)[None]
    try:
        with whole_file(path) as partial:
            Image.fromarray(straight(pictures[0])).save(partial, format="png")
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): run the command again to resume"
        ) from None
