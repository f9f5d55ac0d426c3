"""Score a model: `python -m train.evaluate --model FOLDER --output DIR`.

GenEval-style accuracies: a detector of the rendered glyphs (train/evaluation/stickers/detector.py)
finds the objects in each picture of prompts of six categories, and the rules of GenEval (arXiv
2310.11513) decide whether the picture is correct. The table also has the upper limits of every
score: the scores of the prompts' rendered scenes, and of these scenes after encoding and decoding.
Flow validation loss: the error of the predicted velocity on fixed latents, fixed noise and fixed
noise levels.
"""

from pathlib import Path

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import draw_settings
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.settings import check_width, held_widths
from train.data.stickers.vocabulary import known_nouns
from train.evaluation.stickers.evaluation import Evaluation
from train.evaluation.stickers.score import noun_prompts
from train.options.evaluate import parse


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None


def main() -> None:
    args = parse()
    if args.noun:
        noun_prompts(args.noun, 1)  # an unknown noun is an error before the folder is created
    if args.output:
        check_new(args.output)
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(args.model, few_step=True)
    config = components.config
    if args.lora:
        load_lora(args.lora, components.transformer, name="scored", base_model=config.name)
    names = args.model_widths or [width.name for width in held_widths(config)]
    evaluation = Evaluation(
        components,
        widths=[check_width(config, name) for name in names],
        settings=draw_settings(args),
        num_nouns=known_nouns(components) if args.num_nouns is None else args.num_nouns,
        per_category=args.per_category,
        batch_size=args.batch_size,
        output=args.output,
        ceilings=args.ceilings,
    )
    if args.output:
        _make_folder(args.output)
    if args.gallery:
        evaluation.gallery(args.output / "gallery.png")
        return
    if args.noun:
        print(evaluation.noun(args.noun), end="")
        return
    settings = evaluation.settings.resolved(config)
    recorded = {
        "model": args.model,
        "lora": args.lora and str(args.lora),
        "num_nouns": evaluation.num_nouns,
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
    print(evaluation.scores(recorded, validation_scenes=args.validation_scenes), end="")


if __name__ == "__main__":
    run_command(main)
