"""Measure a model: `python -m train.evaluate --model FOLDER --data DIR --output OUT`.

    python -m train.evaluate --model MODEL --data PREPARED --clip openai/clip-vit-base-patch32
    python -m train.evaluate --model MODEL --geneval evaluation_metadata.jsonl --output OUT
    python -m train.evaluate --model MODEL --dpg prompts --output OUT
    python -m train.evaluate --data stickers:pictures=package

On the part of --data that is kept for validation: flow validation loss, the error of the predicted
velocity on fixed latents, fixed noise and fixed noise levels, for each width. With --clip also CLIP
score and CMMD of pictures that are drawn for the captions of that part. --geneval and --dpg draw
the prompts of these benchmarks in the layout that their own scorers read; run the same command
again to resume.

Stickers, GenEval-style accuracies: a detector of the rendered glyphs
(train/evaluation/stickers/detector.py) finds the objects in each picture of prompts of six
categories, and the rules of GenEval (arXiv 2310.11513) decide whether the picture is correct. The
table also has the upper limits of every score: the scores of the prompts' rendered scenes, and of
these scenes after encoding and decoding.
"""

import argparse
import contextlib
import errno
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.clip_towers import load_clip_towers
from mlx_snapgen.checkpoint.memory import (
    check_memory,
    default_batch_size,
    transformer_bytes,
)
from mlx_snapgen.checkpoint.model import (
    Components,
    load_pretrained,
    note_few_step_widths,
    warn_untrained,
)
from mlx_snapgen.cli.notices import announce, write_line
from mlx_snapgen.cli.options import draw_settings, model_choice
from mlx_snapgen.errors import UserError, plural, run_command
from mlx_snapgen.files import lock_folder, unlock_folder
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.open_model import open_model
from mlx_snapgen.settings import WIDTHS, DrawSettings, Width, check_width, held_widths
from mlx_snapgen.teachers.folder import TeacherFolder, load_flow_teacher
from train.data.encoded import as_latents, check_channels
from train.data.open import open_data
from train.data.prepared import prepared_parts
from train.data.source import Samples
from train.data.stickers.source import Stickers
from train.data.stickers.vocabulary import check_drawable, known_nouns
from train.evaluation.measures import Measurement
from train.evaluation.models import MeasuredModel, OwnModel, PublicModel
from train.evaluation.prompt_lists import (
    PROMPTS,
    PromptFiles,
    claim_folder,
    dpg_files,
    draw_files,
    geneval_files,
)
from train.evaluation.stickers.evaluation import Evaluation
from train.evaluation.stickers.score import noun_prompts
from train.evaluation.validation import held_out_batches
from train.options.evaluate import UNFINISHED, parse
from train.setup.data import check_not_empty, data_from

FILES = (
    *("table.md", "results.json", "losses.png", "sheet.png", "gallery.png"),
    *(f"{name}_scenes.png" for name in ("rendered", "reconstructed")),
    *(f"{width.name}.png" for width in WIDTHS),
)
"""Of an output, which the next command replaces if it is unfinished."""


@contextlib.contextmanager
def _writing(folder: Path | None) -> Iterator[None]:
    """In the block, the output's folder counts as unfinished.

    Raises:
        UserError: a file of the output cannot be written.
    """
    if folder is None:
        yield
        return
    mark = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock_folder(folder):
            raise UserError(f"another process measures into {folder}: choose another --output")
        if mark.exists():
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
        mark.touch()
        yield
        mark.unlink()
    except KeyboardInterrupt:
        print(f"{folder}: run the same command again to start over", file=sys.stderr)
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        if not (full or str(error.filename).startswith(str(folder))):
            raise
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}); it has what was measured so "
            "far: run the same command again to start over"
        ) from None
    finally:
        unlock_folder(folder)


def _recorded(args: argparse.Namespace, settings: DrawSettings) -> dict[str, Any]:
    """Settings for results.json that all measures share."""
    return {
        "model": args.model,
        **{name: getattr(args, name) for name in ("revision", "base", "quantize")},
        "lora": args.lora and str(args.lora),
        "seed": args.seed,
        "steps": settings.num_inference_steps,
        "guidance": settings.guidance_scale,
        "time_shift": settings.time_shift,
        "few_step": settings.few_step,
        "attention_modulation": settings.attention_modulation,
        "batch_size": args.batch_size,
    }


# --- pictures -----------------------------------------------------------------------------------


def _sized(args: argparse.Namespace) -> DrawSettings:
    """The settings with exactly the size of --height and --width."""
    size = {"height": args.height, "width": args.width, "force_size": True}
    # Measured models draw in batches of any size, also public ones.
    return replace(draw_settings(args), **size, batch_size=None)


def _held_out(args: argparse.Namespace, model: MeasuredModel) -> tuple[list[Samples], str]:
    """The samples to measure on, and what they are."""
    config = model.config
    # Not --seed: the same pictures and captions for every model and seed.
    source = data_from(args, size=config.image_size, unit=config.size_unit, seed=0)
    part, name = source.validation(), "held-out pictures"
    if part is None:
        print(
            "warning: the data keeps no pictures for validation: measured on pictures to train on",
            file=sys.stderr,
        )
        check_not_empty(source)
        part, name = source, "training pictures"
    for prepared in prepared_parts(part) if isinstance(model, OwnModel) else ():
        prepared.check_text_states(config.text_encoders)
    sources = [as_latents(s, model.autoencoder) for s in part.sources]
    # As equal as possible; all in one order, so that fewer pictures are the first of more.
    counts = [len(range(i, args.pictures, len(sources))) for i in range(len(sources))]
    with announce("reading the validation part ..."):
        batches = [
            samples
            for latents, count in zip(sources, counts, strict=True)
            for samples in held_out_batches(latents, count, batch_size=args.batch_size)
        ]
    return batches, name


def _measure(args: argparse.Namespace, model: MeasuredModel, widths: list[Width]) -> None:
    settings = _sized(args)
    resolved = settings.resolved(model.config)
    batches, measured_on = _held_out(args, model)
    clip = None
    if args.clip:
        with announce(f"loading {args.clip} ..."):
            clip = load_clip_towers(args.clip)
    measurement = Measurement(
        model,
        widths=widths,
        batches=batches,
        measured_on=measured_on,
        clip=clip,
        settings=settings,
        prompts=args.prompts,
        batch_size=args.batch_size,
        output=args.output,
    )
    recorded = {"data": args.data, "clip": args.clip} | _recorded(args, resolved)
    with _writing(args.output):
        table = measurement.run(recorded)
    print(table, end="")
    print(
        plural(measurement.count, "picture")
        + (", compared with decoded latents of the data" if clip is not None else "")
        + ("" if clip is not None else "; with --clip also CLIP score and CMMD")
        + (f"; see {args.output}" if args.output else ""),
        file=sys.stderr,
    )


def _listed(args: argparse.Namespace) -> PromptFiles | None:
    """The files of --geneval or --dpg."""
    if args.geneval is not None:
        return geneval_files(args.geneval, per_prompt=args.per_prompt, seed=args.seed)
    return None if args.dpg is None else dpg_files(args.dpg, seed=args.seed)


def _draw_list(
    args: argparse.Namespace, model: MeasuredModel, *, listed: PromptFiles, width: Width
) -> None:
    settings = _sized(args)
    resolved = settings.resolved(model.config)
    if args.dpg is not None and resolved.height != resolved.width:
        raise UserError("DPG-Bench's scorer reads squares: give --height and --width of one size")
    recorded = _recorded(args, resolved)
    del recorded["batch_size"]
    size = {"height": resolved.height, "width": resolved.width, "model_width": width.name}
    claim_folder(args.output, recorded | size | {PROMPTS: listed.digest})
    draw_files(
        model,
        listed,
        output=args.output,
        settings=settings,
        share=width.share,
        batch_size=args.batch_size,
    )
    print(f"{args.output} is complete. Score it in the benchmark's own repository:")
    output = shlex.quote(str(args.output))
    print(f"  {listed.scorer.format(output=output, side=resolved.width)}")


# --- stickers -----------------------------------------------------------------------------------


def _sticker_source(args: argparse.Namespace) -> Stickers:
    """The scenes of --data, or else those of the font."""
    # Scenes have their own sizes.
    opened: Any = open_data(args.data, size=(1, 1), unit=1, seed=0) if args.data else Stickers()
    return opened


def _num_nouns(args: argparse.Namespace, components: Components, source: Stickers) -> int:
    if args.num_nouns is not None:
        return args.num_nouns
    if source.num_nouns is not None:
        return source.num_nouns
    if not (components.vocabulary or {}).get("nouns"):
        raise UserError(
            "the model has no vocabulary of stickers: give --data to measure it on pictures, or "
            "--num-nouns to score stickers"
        )
    return known_nouns(components)


def _score_stickers(args: argparse.Namespace, components: Components, widths: list[Width]) -> None:
    source = _sticker_source(args)
    check_drawable(components, source.pictures, "--data stickers:pictures=FOLDER")
    check_channels(components.config.autoencoder, source.channels)
    evaluation = Evaluation(
        components,
        widths=widths,
        settings=draw_settings(args),
        num_nouns=_num_nouns(args, components, source),
        pictures=source.pictures,
        per_category=args.per_category,
        batch_size=args.batch_size,
        output=args.output,
        ceilings=args.ceilings,
    )
    if args.gallery:
        with _writing(args.output):
            evaluation.gallery(args.output / "gallery.png")
        return
    if args.noun:
        with _writing(args.output):
            table = evaluation.noun(args.noun)
        print(table, end="")
        return
    recorded = {
        "num_nouns": evaluation.num_nouns,
        "per_category": args.per_category,
        "validation_scenes": args.validation_scenes,
    }
    recorded |= _recorded(args, evaluation.settings.resolved(components.config))
    with _writing(args.output):
        table = evaluation.scores(recorded, validation_scenes=args.validation_scenes)
    print(table, end="")


def main() -> None:
    args = parse()
    if args.is_stickers:
        collection = _sticker_source(args).collection
        collection.first(args.num_nouns)
        if args.noun:
            # An unknown noun is an error before the folder is created.
            noun_prompts(args.noun, 1, collection=collection)
    listed = _listed(args)
    model = _load(args)
    config = model.config
    names = args.model_widths or [width.name for width in held_widths(config)]
    widths = [check_width(config, name) for name in names]
    if isinstance(model, OwnModel) and _sized(args).resolved(config).few_step:
        drawn = [width.name for width in (widths[:1] if listed is not None else widths)]
        note_few_step_widths(model.components, drawn, model=args.model)
        if listed is None and not args.is_stickers:
            write_line(
                "note: the validation loss is that of the model without its few-step mode; "
                "pictures are drawn with it"
            )
    if listed is not None:
        _draw_list(args, model, listed=listed, width=widths[0])
    elif not args.is_stickers:
        _measure(args, model, widths)
    elif isinstance(model, OwnModel):
        _score_stickers(args, model.components, widths)
    else:
        raise UserError(
            f"{config.name} is no model of stickers: give --data, --geneval or --dpg to measure it"
        )


def _load(args: argparse.Namespace) -> MeasuredModel:
    """The model to measure; sets `batch_size` if it was not given."""
    choice = model_choice(args)
    folder = open_model(choice)
    # The commit of a branch, as in pictures.
    args.revision = folder.revision
    if isinstance(folder, TeacherFolder):
        args.batch_size = args.batch_size or 1
        args.quantize = folder.quantize
        if args.lora:
            raise UserError(f"LoRAs on {folder.config.name} cannot be measured: leave out --lora")
        with announce(f"loading {folder.config.name} ..."):
            return PublicModel(*load_flow_teacher(folder.path))
    if choice.quantize:
        raise UserError("--quantize is for public models: leave it out")
    size = args.height or folder.config.image_size[0], args.width or folder.config.image_size[1]
    if args.batch_size is None:
        args.batch_size = default_batch_size(transformer_bytes(folder, choice), *size, most=16)
    check_memory(
        folder,
        choice,
        height=size[0],
        width=size[1],
        pictures=args.batch_size,
        guided=_sized(args).resolved(folder.config).guidance_scale != 1,
    )
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(folder, few_step=True)
    warn_untrained(components.transformer, args.model)
    if args.lora:
        name = components.config.name
        load_lora(
            args.lora,
            components.transformer,
            name="scored",
            base_model=name,
            autoencoder=components.autoencoder,
        )
    return OwnModel(components)


if __name__ == "__main__":
    run_command(main)
