"""Draw pictures from the command line: `python -m mlx_snapgen.generate "a red apple"`."""

import argparse
import dataclasses
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.config import load_vocabulary
from mlx_snapgen.cli.generate_options import Saving, build_parser, check_together, is_folder
from mlx_snapgen.cli.interactive import Session, as_settings
from mlx_snapgen.cli.notices import (
    announce,
    peak_process_bytes,
    print_vocabulary,
    short_warnings,
)
from mlx_snapgen.cli.options import draw_settings, model_choice
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.generation import GenerationStep, Pipeline
from mlx_snapgen.metadata import (
    MAX_PIXELS,
    PICTURES,
    find_pictures,
    foreign,
    read_settings,
    save_picture,
    slug,
)
from mlx_snapgen.open_model import open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice, check_choice

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is a `UserError`."""
    args = build_parser().parse_args(argv)
    if args.prompts_file is not None and args.prompt is not None:
        raise UserError("give either a prompt or --prompts-file, not both")
    if args.interactive and (args.prompts_file is not None or args.json):
        raise UserError("--interactive cannot be combined with --prompts-file or --json")
    if args.cache_limit is not None:
        mx.set_cache_limit(args.cache_limit)
    saving = Saving(args.output, args.metadata, args.stepwise_dir, json=args.json)
    reword = as_settings if args.interactive else str
    with short_warnings(name_prompts=args.prompts_file is not None, reword=reword):
        settings, choice, origin = _settings(args)
        check_together(args, settings)
        if args.vocabulary:
            return _print_vocabulary(open_model(choice).path, args.json)
        load = functools.partial(_load, origin=origin)
        if args.interactive:
            session = Session(settings, choice, saving=saving, load=load, draw=_draw)
            if settings.prompt:
                session.take(settings.prompt)
            session.run()
        else:
            prompts = iter([settings.prompt])
            if args.prompts_file is not None:
                prompts = read_prompts(args.prompts_file)
            elif not settings.prompt.strip():
                command = 'python -m mlx_snapgen.generate "a red apple"'
                raise UserError(f"the prompt is empty: say what to draw, such as {command}")
            pipeline = load(choice, settings)
            for prompt in prompts:
                _draw(pipeline, dataclasses.replace(settings, prompt=prompt), saving=saving)
    if not args.json:
        peak = _peak_memory()
        process = peak.get("peak_process_bytes")
        print(
            f"peak memory: {peak['peak_mlx_bytes'] / 2**20:.0f} MiB of arrays"
            + (f", {process / 2**20:.0f} MiB in all" if process else "")
        )
    return 0


def _settings(args: argparse.Namespace) -> tuple[DrawSettings, ModelChoice, dict[str, Any]]:
    """Settings, model, and the metadata of the PNG of --config-from-image ({} without one)."""
    if args.config_from_image is None:
        return draw_settings(args), model_choice(args), {}
    sized = args.height is not None and args.width is not None
    most = None if sized else MAX_PIXELS
    recorded = read_settings(args.config_from_image, max_pixels=most)
    choice, origin = recorded.choice, recorded.values
    if args.model is not None:
        choice = dataclasses.replace(choice, revision=None, base=None)
    choice = model_choice(args, choice)
    others = foreign(choice, model_choice(args))
    if others and not args.trust_settings:
        raise UserError(
            f"{args.config_from_image} was drawn with {others}: --trust-settings uses that, "
            "--model and --lora choose others"
        )
    given = [name for name in PICTURES if getattr(args, name) is not None]
    settings = find_pictures(recorded, args.config_from_image, given=given)
    if args.height is not None or args.width is not None:
        # Only the size in the picture was drawn before.
        settings = dataclasses.replace(settings, force_size=False)
    return draw_settings(args, settings), choice, origin


def _load(choice: ModelChoice, settings: DrawSettings, *, origin: Mapping[str, Any]) -> Pipeline:
    """Load the pipeline, after a check that the model supports the width and the settings."""
    folder = open_model(choice)
    check_choice(folder.config, choice)
    settings.resolved(folder.config)
    dtype = None
    if origin.get("device") == mx.default_device().type.name:
        known = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
        dtype = known.get(origin.get("dtype", ""))
    with announce(f"loading {folder.config.name} ..."):
        pipeline = SnapGenPipeline.from_pretrained(choice, folder=folder, dtype=dtype)
    now = pipeline.describe()
    for key in ("mlx_snapgen", "mlx", "device", "dtype"):
        if key in origin and origin[key] != now[key]:
            warnings.warn(
                f"the picture was made with {key} {origin[key]}, this is {now[key]}: pixels may "
                "differ",
                stacklevel=2,
            )
    return pipeline


def _draw(pipeline: Pipeline, settings: DrawSettings, *, saving: Saving) -> Path:
    """Draw, save and report all pictures of one prompt; returns the last one's file."""
    name, steps, output = slug(settings.prompt), pipeline.generate(settings), saving.output
    target = Path(output or ".") / f"{name}.png"
    if output is not None and not is_folder(output):
        target = Path(output)
    path = target
    for k in range(settings.num_images):
        started, count = time.perf_counter(), f"{k + 1}/{settings.num_images}"
        # A terminal shows a progress bar instead.
        with announce(f"drawing {name} {count} ...", enabled=not sys.stderr.isatty()):
            step, per_step = _last_step(steps, count, name=name, folder=saving.stepwise_dir)
            path = save_picture(
                step.preview(), target, metadata=step.metadata if saving.metadata else None
            )
        seconds = time.perf_counter() - started
        _report(step, path, seconds=seconds, per_step=per_step, as_json=saving.json)
    return path


def _last_step(
    steps: Iterator[GenerationStep], count: str, *, name: str, folder: str | None
) -> tuple[GenerationStep, float]:
    """Draw one picture with a progress bar; returns its last step, and seconds per step.

    Each step's estimate is saved in `folder`, unless that is None.
    """
    with tqdm(desc=count, bar_format=BAR, leave=False, disable=None) as bar:
        started = time.perf_counter()
        for step in steps:
            bar.total = step.num_steps
            bar.set_description_str(f"{count} seed {step.seed}", False)
            per_step = (time.perf_counter() - started) / (step.index + 1)
            bar.set_postfix_str(f"{per_step:.2f} s/step", False)
            bar.update()
            if folder is not None:
                file = f"{name}-seed-{step.seed}-step-{step.index + 1:02d}.png"
                save_picture(step.decode(step.x0), Path(folder) / file)
            if step.final:
                return step, per_step
    raise AssertionError("every picture has a final step")


def _report(
    step: GenerationStep, path: Path, *, seconds: float, per_step: float, as_json: bool
) -> None:
    if as_json:
        result = {"path": str(path), "seconds": round(seconds, 3)}
        result |= {"seconds_per_step": round(per_step, 3), **_peak_memory()}
        print(json.dumps(result | step.metadata), flush=True)
    else:
        print(f"{path} (seed {step.seed}, {seconds:.1f} s, {per_step:.2f} s/step)", flush=True)


def _peak_memory() -> dict[str, int]:
    """Peak memory in bytes of mlx arrays, and on the CPU also of the process."""
    peak = {"peak_mlx_bytes": mx.get_peak_memory()}
    if mx.default_device().type == mx.DeviceType.cpu:
        peak["peak_process_bytes"] = peak_process_bytes()
    return peak


def _print_vocabulary(folder: Path, as_json: bool) -> int:
    vocabulary = load_vocabulary(folder)
    if as_json and vocabulary is not None:
        print(json.dumps(vocabulary, ensure_ascii=False))
    else:
        print_vocabulary(vocabulary, str(folder))
    return 0


def command() -> None:
    """The console script `mlx-snapgen`."""
    run_command(main)


if __name__ == "__main__":
    command()
