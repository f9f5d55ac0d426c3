"""Score a model: `python -m train.evaluate --model FOLDER --output DIR`.

GenEval-style accuracies: prompts of six categories, each picture judged by what a detector of the
rendered glyphs (train/detector.py) finds in it, by the rules of GenEval (arXiv 2310.11513). Every
score stands beside its ceilings: the same detector on the prompts' rendered scenes, and on these
after the autoencoder. Flow validation loss: the error of the predicted velocity on fixed latents,
fixed noise and fixed noise levels.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import FEW_STEP, Components, load_pretrained
from mlx_snapgen.config import WIDTH_NAMES
from mlx_snapgen.draw import sample
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.adapters import lora_weights
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.settings import check_width, parse_width
from train import stickers
from train.autoencoder import reconstruct
from train.captions import with_article
from train.detector import Detection, Detector
from train.geneval import SIX, Prompt, accuracies, fixed_prompts, is_correct
from train.scenes import first_nouns
from train.validation import validation_losses, validation_set

GALLERY, COLUMNS = 40, 10  # pictures of the gallery, and in a row of any contact sheet


@functools.lru_cache(maxsize=2)
def detector(num_nouns: int | None = None, also: str | None = None) -> Detector:
    """The detector of the first `num_nouns` nouns, and of the one named `also`."""
    nouns = first_nouns(num_nouns)
    more = [noun for noun in stickers.NOUNS if noun.name == also and noun not in nouns]
    return Detector([*nouns, *more])


def judge(
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    num_nouns: int | None,
    also: str | None = None,
) -> tuple[list[bool], list[list[Detection]]]:
    """For each picture, uint8 (H, W, 3): whether it shows its prompt, and what it shows.

    `num_nouns` and `also` are those of `detector`.
    """
    detect = detector(num_nouns, also)
    found = [detect(picture) for picture in pictures]
    correct = [
        is_correct(prompt.scene, detections, detect.leftover(picture, detections))
        for prompt, picture, detections in zip(prompts, pictures, found, strict=True)
    ]
    return correct, found


def draw(
    components: Components,
    prompts: Sequence[Prompt],
    width: float,
    seed: int = 0,
    name: str = "sampling",
    **settings,
) -> np.ndarray:
    """Pictures of prompts; `settings` are those of `sampling.sample`."""
    seeds = [seed + prompt.number for prompt in prompts]
    texts = [prompt.text for prompt in prompts]
    with tqdm(total=len(texts), desc=name, unit="picture", leave=False) as bar:
        return sample(components, texts, seeds, width, progress=bar.update, **settings)


def quick_score(
    components: Components,
    num_nouns: int | None = None,
    count_per_category: int = 8,
    steps: int = 14,
    width: float = 1.0,
    **settings,
) -> dict[str, float | None]:
    """The accuracies of one width over few prompts, for a look during training."""
    prompts = fixed_prompts(count_per_category, num_nouns)
    pictures = draw(components, prompts, width, steps=steps, **settings)
    return accuracies(prompts, judge(prompts, pictures, num_nouns)[0])


# --- the whole evaluation -----------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: a width, or what a ceiling was measured on.
        scores: see `accuracies`.
        validation_losses: one per noise level; empty for a ceiling.
        seconds_per_picture: of the sampling, in batches; None for a ceiling.
        judged: per picture the prompt, what was found, and whether that is correct.
    """

    name: str
    scores: dict[str, float | None]
    validation_losses: list[float]
    seconds_per_picture: float | None
    judged: list[dict]


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    titles = ["", *(category.replace("_", " ") for category in SIX)]
    titles += ["overall", "held-out", "validation loss", "s / picture"]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    for row in rows:
        s, losses, seconds = row.scores, row.validation_losses, row.seconds_per_picture
        lines.append(
            [
                row.name,
                *(f"{s[category]:.2f}" for category in SIX),
                f"{s['overall']:.3f} ± {s['overall_error']:.3f}",
                "" if s["held_out"] is None else f"{s['held_out']:.2f}",
                f"{np.mean(losses):.4f}" if losses else "",
                "" if seconds is None else f"{seconds:.2f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(
    name: str,
    prompts: Sequence[Prompt],
    pictures: Sequence[np.ndarray],
    num_nouns: int | None,
    losses: list[float] | None = None,
    seconds: float | None = None,
) -> Row:
    correct, found = judge(prompts, pictures, num_nouns)
    records = [
        {
            "prompt": prompt.text,
            "category": prompt.scene.category,
            "held_out": prompt.held_out,
            "correct": ok,
            "found": [asdict(detection) for detection in detections],
        }
        for prompt, ok, detections in zip(prompts, correct, found, strict=True)
    ]
    return Row(name, accuracies(prompts, correct), losses or [], seconds, records)


def _marked(picture: np.ndarray, correct: bool) -> np.ndarray:
    """The picture with a tick or a cross in its corner."""
    image = Image.fromarray(picture)
    drawing = ImageDraw.Draw(image)
    left = image.width - 15
    drawing.rectangle((left - 2, 0, image.width, 15), fill="white")
    if correct:
        drawing.line((left, 8, left + 4, 12, left + 12, 2), fill=(0, 150, 60), width=2)
    else:
        drawing.line((left, 2, left + 11, 13), fill=(215, 20, 20), width=2)
        drawing.line((left, 13, left + 11, 2), fill=(215, 20, 20), width=2)
    return np.asarray(image)


def _evaluate(
    components: Components, widths: Sequence[str], num_nouns: int, args: argparse.Namespace
) -> list[Row]:
    """All rows; what is known so far lies in the output folder after each."""
    prompts = fixed_prompts(args.per_category, num_nouns)
    data = validation_set(components, args.validation_scenes, num_nouns)
    rows = []
    few_step = components.config.few_step
    mode = components.config.sampler_for(args.steps, args.few_step)
    adapters = {} if few_step is None else {FEW_STEP: float(mode is few_step)}

    def finish(row: Row, pictures: np.ndarray) -> None:
        rows.append(row)
        if args.output:
            _write(args.output, rows, pictures, _settings(args, components, num_nouns))

    for name in widths:
        width = parse_width(name)
        started = time.perf_counter()
        pictures = draw(components, prompts, width, args.seed, name, **_sampling(args))
        seconds = (time.perf_counter() - started) / len(prompts)
        with lora_weights(components.transformer, adapters):
            losses = validation_losses(components, data, width)
        finish(_row(name, prompts, pictures, num_nouns, losses, seconds), pictures)
    if args.ceilings:
        truth = np.stack([stickers.render(prompt.scene) for prompt in prompts])
        again = reconstruct(components.autoencoder, truth)
        for name, pictures in (("rendered scenes", truth), ("reconstructed scenes", again)):
            finish(_row(name, prompts, pictures, num_nouns), pictures)
    return rows


def _make_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose another --output or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def _sampling(args: argparse.Namespace) -> dict:
    return {
        "steps": args.steps,
        "guidance": args.guidance,
        "time_shift": args.time_shift,
        "few_step": args.few_step,
        "attention_modulation": args.attention_modulation,
        "batch_size": args.batch_size,
    }


def _settings(args: argparse.Namespace, components: Components, num_nouns: int) -> dict:
    """What the scores depend on, for results.json."""
    own = components.config.sampler_for(args.steps, args.few_step)
    return {
        "model": args.model,
        "lora": args.lora and str(args.lora),
        "num_nouns": num_nouns,
        "per_category": args.per_category,
        "validation_scenes": args.validation_scenes,
        "seed": args.seed,
        "steps": own.num_inference_steps if args.steps is None else args.steps,
        "guidance": own.guidance_scale if args.guidance is None else args.guidance,
        "time_shift": own.time_shift if args.time_shift is None else args.time_shift,
        "few_step": own is components.config.few_step,
        "attention_modulation": args.attention_modulation,
        "batch_size": args.batch_size,
    }


def _write(output: Path, rows: Sequence[Row], pictures: np.ndarray, settings: dict) -> None:
    """Tables of all rows so far, and a contact sheet of the last one's pictures."""
    (output / "table.md").write_text(table(rows))
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    row = rows[-1]
    marked = [_marked(p, r["correct"]) for p, r in zip(pictures, row.judged, strict=True)]
    sheet = stickers.contact_sheet(marked, [r["prompt"] for r in row.judged], COLUMNS)
    sheet.save(output / f"{row.name.replace(' ', '_')}.png")


NOUN_SEED = 1  # not what `train.stickers --noun` writes unless it is told to


def noun_prompts(name: str, count: int) -> list[Prompt]:
    """Prompts for one noun alone, every other one in plain wording."""
    scenes = [stickers.noun_scene(name, NOUN_SEED, k) for k in range(count)]
    texts = [s.caption if k % 2 else stickers.plain_caption(s) for k, s in enumerate(scenes)]
    return [
        Prompt(text, s, False, k) for k, (text, s) in enumerate(zip(texts, scenes, strict=True))
    ]


def _score_noun(
    components: Components, widths: Sequence[str], num_nouns: int, args: argparse.Namespace
) -> str:
    """How often pictures of `args.noun` show it, as a table; sheets go to the output folder."""
    prompts = noun_prompts(args.noun, args.per_category)
    lines = [f"| | {args.noun} |", "| --- | ---: |"]

    def add(name: str, pictures: Sequence[np.ndarray]) -> None:
        correct, _ = judge(prompts, pictures, num_nouns, args.noun)
        share = float(np.mean(correct))
        error = np.sqrt(share * (1 - share) / len(prompts))
        lines.append(f"| {name} | {share:.3f} ± {error:.3f} |")
        if args.output:
            marked = [_marked(p, ok) for p, ok in zip(pictures, correct, strict=True)]
            sheet = stickers.contact_sheet(marked, [p.text for p in prompts], COLUMNS)
            sheet.save(args.output / f"{name.replace(' ', '_')}.png")
            (args.output / "table.md").write_text("\n".join(lines) + "\n")

    for name in widths:
        pictures = draw(components, prompts, parse_width(name), args.seed, name, **_sampling(args))
        add(name, pictures)
    if args.ceilings:
        truth = np.stack([stickers.render(prompt.scene) for prompt in prompts])
        add("rendered scenes", truth)
        add("reconstructed scenes", reconstruct(components.autoencoder, truth))
    return "\n".join(lines) + "\n"


def gallery_prompts(count: int, num_nouns: int | None) -> list[str]:
    """Up to `count` prompts such as "an apple", of nouns from all over the list."""
    nouns = first_nouns(num_nouns)
    count = min(count, len(nouns))
    return [with_article(nouns[k * len(nouns) // count].name) for k in range(count)]


def known_nouns(components: Components) -> int:
    """How many of the vocabulary's nouns, from the first, the model has learned."""
    names = (components.vocabulary or {}).get("nouns")
    if names is None:
        raise UserError("the model has no vocabulary.json: say --num-nouns")
    if names != [noun.name for noun in stickers.NOUNS[: len(names)]]:
        raise UserError("the model knows other nouns than this vocabulary: say --num-nouns")
    return len(names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Score a stickers model: GenEval-style accuracies and flow validation loss.",
    )
    parser.add_argument("--model", required=True, help="model folder, or a Hugging Face owner/name")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for tables and contact sheets; not yet"
    )
    parser.add_argument(
        "--widths", nargs="+", metavar="WIDTH", help=f"of {', '.join(WIDTH_NAMES)} (default: all)"
    )
    parser.add_argument(
        "--lora", type=Path, metavar="FILE", help="score the model with this LoRA (train.lora)"
    )
    parser.add_argument(
        "--noun",
        metavar="NAME",
        help="score pictures of this noun alone, such as one that a LoRA has learned; it need not "
        "be of the model's vocabulary",
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--time-shift", type=float, help="timestep shift (default: the model's)")
    parser.add_argument(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the model's few-step mode or not (default: for few steps, if it has one)",
    )
    parser.add_argument(
        "--attention-modulation", action="store_true", help="as EDT does (default: no)"
    )
    parser.add_argument(
        "--per-category",
        type=int,
        default=25,
        metavar="N",
        help="prompts of each of the six, or of --noun",
    )
    parser.add_argument("--validation-scenes", type=int, default=128, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the prompts are fixed")
    parser.add_argument("--num-nouns", type=int, metavar="N", help="if not the model's own number")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time")
    parser.add_argument(
        "--ceilings",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also score rendered scenes, straight and through the autoencoder (default: yes)",
    )
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="draw 40 single things with the first width for a person to see, and score nothing",
    )
    return parser


def main() -> None:
    args = _parser().parse_args()
    for name in ("per_category", "validation_scenes", "batch_size", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    if args.gallery and not args.output:
        raise UserError("--gallery needs --output, the folder for its picture")
    if args.noun:
        noun_prompts(args.noun, 1)  # an unknown one is found before there is a folder
    if args.output:
        _make_folder(args.output)
    components = load_pretrained(args.model, few_step=True)
    if args.lora:
        load_lora(args.lora, components.transformer, 1.0, "scored", components.config.name)
    num_nouns = args.num_nouns or known_nouns(components)
    held = [n for n, w in WIDTH_NAMES.items() if w in components.config.transformer.widths]
    widths = args.widths or held
    for name in widths:
        check_width(components.config, name)
    if args.gallery:
        texts = gallery_prompts(GALLERY, num_nouns)
        width, seeds = parse_width(widths[0]), range(args.seed, args.seed + len(texts))
        with tqdm(total=len(texts), unit="picture") as bar:
            pictures = sample(
                components, texts, seeds, width, progress=bar.update, **_sampling(args)
            )
        stickers.contact_sheet(list(pictures), texts, COLUMNS).save(args.output / "gallery.png")
        return
    if args.noun:
        print(_score_noun(components, widths, num_nouns, args), end="")
        return
    print(table(_evaluate(components, widths, num_nouns, args)), end="")


if __name__ == "__main__":
    run_command(main)
