"""Score a model: `python -m train.evaluate --model FOLDER --output DIR`.

GenEval-style accuracies: prompts of six categories, each picture judged by what a detector of the
rendered glyphs (train/evaluation/detector.py) finds in it, by the rules of GenEval (arXiv
2310.11513). Every score stands beside its ceilings: the same detector on the prompts' rendered
scenes, and on these after the autoencoder. Flow validation loss: the error of the predicted
velocity on fixed latents, fixed noise and fixed noise levels.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import FEW_STEP, Components, load_pretrained
from mlx_snapgen.draw import draw_pictures
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.adapters import lora_weights
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.pictures import contact_sheet
from mlx_snapgen.settings import WIDTH_NAMES, DrawSettings, check_width, held_widths, parse_width
from train.data.stickers.render import render
from train.data.stickers.vocabulary import known_nouns
from train.evaluation.geneval import fixed_prompts
from train.evaluation.reconstruction import reconstruct
from train.evaluation.report import Row, make_row, marked_picture, table
from train.evaluation.score import draw, gallery_prompts, judge, noun_prompts
from train.evaluation.validation import validation_losses, validation_set

GALLERY, COLUMNS = 40, 10  # pictures of the gallery, and in a row of any contact sheet


# --- the whole evaluation -----------------------------------------------------------------------


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
        share = parse_width(name).share
        started = time.perf_counter()
        pictures = draw(
            components,
            prompts,
            settings=_sampling(args),
            share=share,
            name=name,
            batch_size=args.batch_size,
        )
        seconds = (time.perf_counter() - started) / len(prompts)
        with lora_weights(components.transformer, adapters):
            losses = validation_losses(components, data, share)
        finish(make_row(name, prompts, pictures, num_nouns, losses, seconds), pictures)
    if args.ceilings:
        truth = np.stack([render(prompt.scene) for prompt in prompts])
        again = reconstruct(components.autoencoder, truth)
        for name, pictures in (("rendered scenes", truth), ("reconstructed scenes", again)):
            finish(make_row(name, prompts, pictures, num_nouns), pictures)
    return rows


def _make_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists: choose another --output or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def _sampling(args: argparse.Namespace) -> DrawSettings:
    return DrawSettings(
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        time_shift=args.time_shift,
        few_step=args.few_step,
        attention_modulation=args.attention_modulation,
        seed=args.seed,
    )


def _settings(args: argparse.Namespace, components: Components, num_nouns: int) -> dict:
    """What the scores depend on, for results.json."""
    settings = _sampling(args).resolved(components.config)
    return {
        "model": args.model,
        "lora": args.lora and str(args.lora),
        "num_nouns": num_nouns,
        "per_category": args.per_category,
        "validation_scenes": args.validation_scenes,
        "seed": args.seed,
        "steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "time_shift": settings.time_shift,
        "few_step": settings.few_step,
        "attention_modulation": settings.attention_modulation,
        "batch_size": args.batch_size,
    }


def _write(output: Path, rows: Sequence[Row], pictures: np.ndarray, settings: dict) -> None:
    """Tables of all rows so far, and a contact sheet of the last one's pictures."""
    (output / "table.md").write_text(table(rows))
    results = {"settings": settings, "rows": [asdict(row) for row in rows]}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    row = rows[-1]
    marked = [marked_picture(p, r["correct"]) for p, r in zip(pictures, row.judged, strict=True)]
    sheet = contact_sheet(marked, [r["prompt"] for r in row.judged], COLUMNS)
    sheet.save(output / f"{row.name.replace(' ', '_')}.png")


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
            marked = [marked_picture(p, ok) for p, ok in zip(pictures, correct, strict=True)]
            sheet = contact_sheet(marked, [p.text for p in prompts], COLUMNS)
            sheet.save(args.output / f"{name.replace(' ', '_')}.png")
            (args.output / "table.md").write_text("\n".join(lines) + "\n")

    for name in widths:
        pictures = draw(
            components,
            prompts,
            settings=_sampling(args),
            share=parse_width(name).share,
            name=name,
            batch_size=args.batch_size,
        )
        add(name, pictures)
    if args.ceilings:
        truth = np.stack([render(prompt.scene) for prompt in prompts])
        add("rendered scenes", truth)
        add("reconstructed scenes", reconstruct(components.autoencoder, truth))
    return "\n".join(lines) + "\n"


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
        load_lora(
            args.lora,
            components.transformer,
            name="scored",
            base_model=components.config.name,
        )
    num_nouns = args.num_nouns or known_nouns(components)
    held = [width.name for width in held_widths(components.config)]
    widths = args.widths or held
    for name in widths:
        check_width(components.config, name)
    if args.gallery:
        texts = gallery_prompts(GALLERY, num_nouns)
        with tqdm(total=len(texts), unit="picture") as bar:
            pictures = draw_pictures(
                components,
                texts,
                seeds=range(args.seed, args.seed + len(texts)),
                settings=_sampling(args),
                share=parse_width(widths[0]).share,
                batch_size=args.batch_size,
                progress=bar.update,
            )
        contact_sheet(list(pictures), texts, COLUMNS).save(args.output / "gallery.png")
        return
    if args.noun:
        print(_score_noun(components, widths, num_nouns, args), end="")
        return
    print(table(_evaluate(components, widths, num_nouns, args)), end="")


if __name__ == "__main__":
    run_command(main)
