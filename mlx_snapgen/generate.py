"""Draw pictures from the command line: `python -m mlx_snapgen.generate "a red apple"`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.config import load_vocabulary
from mlx_snapgen.cli.generate_options import Saving, build_parser, check_together, is_folder
from mlx_snapgen.cli.notices import (
    announce,
    peak_process_bytes,
    print_vocabulary,
    short_warnings,
    write_line,
)
from mlx_snapgen.cli.options import draw_settings, model_choice
from mlx_snapgen.cli.prompts_file import count_prompts, read_prompts
from mlx_snapgen.errors import UserError, plural, run_command
from mlx_snapgen.files import expanded
from mlx_snapgen.metadata import (
    MAX_PIXELS,
    PICTURES,
    find_pictures,
    foreign,
    read_settings,
    save_picture,
    slug,
)
from mlx_snapgen.open_model import find_description, open_model
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.pipeline_base import GenerationStep, Pipeline
from mlx_snapgen.settings import DrawSettings, ModelChoice

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
    reword: Callable[[str], str] = str
    if args.interactive:
        from mlx_snapgen.cli.interactive import as_settings

        reword = as_settings
    with short_warnings(name_prompts=args.prompts_file is not None, reword=reword):
        settings, choice, origin = _settings(args)
        check_together(args, settings)
        if args.vocabulary:
            return _print_vocabulary(find_description(choice), args.json)
        load = functools.partial(_load, origin=origin)
        if args.interactive:
            from mlx_snapgen.cli.interactive import Session

            session = Session(settings, choice, saving=saving, load=load, draw=_draw)
            if settings.prompt:
                session.take(settings.prompt)
            session.run()
        else:
            prompts, count = iter([settings.prompt]), 0
            if args.prompts_file is not None:
                if _is_file(args.prompts_file):
                    count = count_prompts(args.prompts_file)
                prompts = read_prompts(args.prompts_file)
            elif not settings.prompt.strip():
                command = 'python -m mlx_snapgen.generate "a red apple"'
                raise UserError(f"the prompt is empty: say what to draw, such as {command}")
            pipeline = load(choice, settings)
            if count:
                _draw(pipeline, settings, saving=saving, prompts=prompts, count=count)
            else:
                # A program that writes to a pipe may wait for the picture before the next prompt.
                for number, prompt in enumerate(prompts):
                    one = dataclasses.replace(settings, prompt=prompt)
                    before = None if args.prompts_file is None else number * one.num_images
                    _draw(pipeline, one, saving=saving, before=before)
    if not args.json:
        peak = _peak_memory()
        process = peak.get("peak_process_bytes")
        # A part of the arrays is reserved, but never used.
        of = "in all" if process else "of arrays"
        print(f"peak memory: {(process or peak['peak_mlx_bytes']) / 2**20:.0f} MiB {of}")
    return 0


def _is_file(prompts: str | None) -> bool:
    return prompts not in (None, "-") and expanded(prompts).is_file()


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
    folder = open_model(choice, settings=settings)
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


def _draw(
    pipeline: Pipeline,
    settings: DrawSettings,
    *,
    saving: Saving,
    prompts: Iterable[str] | None = None,
    count: int = 1,
    before: int | None = None,
) -> Path:
    """Draw, save and report all pictures of the prompt, or of each of `prompts`.

    Args:
        count: number of prompts.
        before: pictures of earlier prompts, if nobody knows how many follow.

    Returns the last one's file.
    """
    total = count * settings.num_images
    of = f"/{total}" if before is None else ""
    if prompts is None:
        steps = pipeline.generate(settings)
    else:
        steps = pipeline.generate_prompts(prompts, settings)
    name = f"{slug(settings.prompt)} " if prompts is None else ""
    paths: list[Path] = []
    drawn = True
    # Of a prompts file, what cannot be read is reported when its turn comes.
    while drawn and (prompts is not None or len(paths) < settings.num_images):
        first, is_more = (before or 0) + len(paths) + 1, len(paths) < total
        # A terminal shows a progress bar instead.
        enabled = is_more and not sys.stderr.isatty()
        with announce(f"drawing {name}{first}{of} ...", enabled=enabled):
            drawn = _draw_batch(steps, first, of=of, saving=saving, has_bar=is_more)
        paths += drawn
    return paths[-1]


@contextlib.contextmanager
def _progress(description: str, *, enabled: bool) -> Iterator[Any]:
    """A progress bar in a terminal; None elsewhere."""
    if not (enabled and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=description, bar_format=BAR, leave=False) as bar:
        yield bar


def _draw_batch(
    steps: Iterator[GenerationStep], first: int, *, of: str, saving: Saving, has_bar: bool
) -> list[Path]:
    """Draw, save and report the pictures of the next batch, of which there may be none.

    Args:
        first: the number of the first one.
        of: follows the number of the last one.
    """
    batch, finished, per_step = range(0), [], 0.0
    started = time.perf_counter()
    paths: list[Path] = []
    try:
        with _progress(f"{first}{of}", enabled=has_bar) as bar:
            for step in steps:
                batch = step.batch
                if saving.stepwise_dir is not None:
                    name = f"{slug(step.metadata['prompt'])}-seed-{step.seed}"
                    file = f"{name}-step-{step.index + 1:02d}.png"
                    save_picture(step.decode(step.x0), Path(saving.stepwise_dir) / file)
                if step.final:
                    finished.append(step)
                if step.image == batch[-1]:
                    per_step = (time.perf_counter() - started) / (step.index + 1)
                    if bar is not None:
                        several = f"{first}-{first + len(batch) - 1}{of}"
                        one = f"{first}{of} seed {step.seed}"
                        text = one if len(batch) == 1 else several
                        bar.total = step.num_steps
                        bar.set_description_str(text, False)
                        bar.set_postfix_str(f"{per_step:.2f} s/step", False)
                        bar.update()
                    if step.final:
                        break
        for step in finished:
            paths.append(_save(step, per_step / len(batch), saving=saving))
    except KeyboardInterrupt:
        if len(batch) > 1 and len(paths) < len(batch):
            lost = plural(len(batch) - len(paths), "unfinished picture")
            write_line(f"lost {lost} of this batch; --batch-size 1 draws one by one")
        raise
    return paths


def _save(step: GenerationStep, per_step: float, *, saving: Saving) -> Path:
    """Decode, save and report a picture; `per_step` are the seconds that each of its steps took."""
    started = time.perf_counter()
    path = save_picture(
        step.preview(),
        _target(saving.output, step.metadata["prompt"]),
        metadata=step.metadata if saving.metadata else None,
    )
    seconds = per_step * step.num_steps + time.perf_counter() - started
    if saving.json:
        result = {"path": str(path), "seconds": round(seconds, 3)}
        result |= {"seconds_per_step": round(per_step, 3), **_peak_memory()}
        print(json.dumps(result | step.metadata), flush=True)
    else:
        print(f"{path} (seed {step.seed}, {seconds:.1f} s, {per_step:.2f} s/step)", flush=True)
    return path


def _target(output: str | None, prompt: str) -> Path:
    """The file of a picture, if there is none yet."""
    if output is not None and not is_folder(output):
        return Path(output)
    return Path(output or ".") / f"{slug(prompt)}.png"


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
