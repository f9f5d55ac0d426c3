"""Draw pictures from the command line: `python -m mlx_snapgen.generate "a red apple"`."""

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_snapgen.checkpoint.config import load_config, load_vocabulary
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.cli.interactive import Session
from mlx_snapgen.cli.options import build_parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.metadata import RECORDED, read_settings, save_picture, slug
from mlx_snapgen.pipeline import GenerationStep, SnapGenPipeline
from mlx_snapgen.settings import MAX_SEED, check_size, check_width

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; mistakes are `UserError`s."""
    args = build_parser().parse_args(argv)
    if args.prompts_file is not None and args.prompt is not None:
        raise UserError("give either a prompt or --prompts-file, not both")
    with _notices():
        origin = _fill_from_image(args)
        if not args.vocabulary:
            _check(args)
        folder = find_model(args.model, args.revision)
        if args.vocabulary:
            return _print_vocabulary(folder, args.json)
        if args.interactive:
            _interact(args, origin)
        else:
            prompts = _prompts(args)
            pipeline = _load(args, folder, origin)
            for prompt in prompts:
                _draw(pipeline, prompt, args)
    if not args.json:
        peak = _peak_memory()
        process = peak.get("peak_process_bytes")
        print(
            f"peak memory: {peak['peak_mlx_bytes'] / 2**20:.0f} MiB of arrays"
            + (f", {process / 2**20:.0f} MiB in all" if process else "")
        )
    return 0


def _interact(args: argparse.Namespace, origin: dict[str, Any]) -> None:
    """Prompts from the terminal, the given one first."""
    session = Session(
        args,
        load=lambda: _load(args, find_model(args.model, args.revision), origin),
        draw=lambda pipeline, prompt: _draw(pipeline, prompt, args),
    )
    if args.prompt is not None:
        session.take(args.prompt)
    session.run()


def _check(args: argparse.Namespace) -> None:
    """All that can be wrong before a model is there."""
    if args.interactive and (args.prompts_file is not None or args.json):
        raise UserError("--interactive goes with neither --prompts-file nor --json")
    if args.prompts_file is None and args.prompt is None and not args.interactive:
        raise UserError('say what to draw: python -m mlx_snapgen.generate "a red apple"')
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("the prompt is empty: say what to draw")
    if args.seed is not None and args.seed > MAX_SEED - args.num_images + 1:
        raise UserError(f"--seed {args.seed} leaves no room for {args.num_images} pictures")
    if args.output is not None:
        path = Path(args.output)
        if _is_folder(args.output):
            _check_folder("--output", path)
        elif path.suffix.lower() != ".png":
            raise UserError(
                f"--output {args.output}: give a name ending in .png, or a folder ending in /"
            )
        else:
            _check_folder("--output", path.parent)
    if args.stepwise_dir is not None:
        _check_folder("--stepwise-dir", Path(args.stepwise_dir))


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def _check_folder(option: str, folder: Path) -> None:
    """`UserError` unless `folder` is a writable folder or can become one."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{option}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{option}: no permission to write into {existing}")


def _fill_from_image(args: argparse.Namespace) -> dict[str, Any]:
    """Take over what `--config-from-image` knows and the options leave open; returns all of it."""
    if args.config_from_image is None:
        return {}
    origin = read_settings(args.config_from_image)
    explicit_model = args.model is not None
    for key in RECORDED:
        if getattr(args, key) is None and not (key == "revision" and explicit_model):
            setattr(args, key, origin[key])
    return origin


def _load(args: argparse.Namespace, folder: Path, origin: dict[str, Any]) -> SnapGenPipeline:
    """The pipeline, once width and size are known to suit its config."""
    config = load_config(folder)
    model_width = args.model_width or "full"
    check_width(config, model_width)
    height, width = config.image_size
    check_size(
        config,
        height if args.height is None else args.height,
        width if args.width is None else args.width,
    )
    dtype = None
    if origin.get("device") == mx.default_device().type.name:
        known = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
        dtype = known.get(origin.get("dtype"))
    pipeline = SnapGenPipeline.from_pretrained(
        args.model,
        args.revision,
        model_width,
        args.quantize or None,
        dtype,
        args.loras or (),
        args.text_encoders,
        args.keep_text_encoders,
    )
    _compare(origin, pipeline.describe())
    return pipeline


def _compare(origin: dict[str, Any], now: dict[str, Any]) -> None:
    """Notice what may keep a repeated picture from being the same."""
    for key in ("mlx_snapgen", "mlx", "device", "dtype"):
        if key in origin and origin[key] != now[key]:
            warnings.warn(
                f"the picture was made with {key} {origin[key]}, this is {now[key]}: pixels may "
                "differ",
                stacklevel=2,
            )


def _prompts(args: argparse.Namespace) -> Iterator[str]:
    """The prompts, read line by line as they are wanted; the file is opened at once."""
    if args.prompts_file is None:
        return iter([args.prompt])
    if args.prompts_file == "-":
        return _lines(sys.stdin, "stdin")
    try:
        return _lines(open(args.prompts_file, encoding="utf-8-sig"), args.prompts_file)
    except OSError as error:
        raise UserError(f"cannot read {args.prompts_file}: {error.strerror}") from None


def _lines(stream: Any, name: str) -> Iterator[str]:
    count = 0
    with nullcontext() if stream is sys.stdin else stream:
        try:
            for line in stream:
                prompt = line.strip()
                if prompt and not prompt.startswith("#"):
                    count += 1
                    yield prompt
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"cannot read {name}: {error}") from None
    if not count:
        raise UserError(f"{name} holds no prompt")


def _draw(pipeline: SnapGenPipeline, prompt: str, args: argparse.Namespace) -> None:
    """Draw, save and report all pictures of one prompt."""
    steps = pipeline.generate(
        prompt,
        negative_prompt=args.negative_prompt or "",
        height=args.height,
        width=args.width,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        few_step=args.few_step,
        attention_modulation=bool(args.attention_modulation),
        seed=args.seed,
        num_images=args.num_images,
    )
    for k in range(args.num_images):
        started = time.perf_counter()
        count = f"{k + 1}/{args.num_images}"
        with tqdm(desc=count, bar_format=BAR, leave=False, disable=None) as bar:
            for step in steps:
                bar.total = step.num_steps
                bar.set_description_str(f"{count} seed {step.seed}", False)
                per_step = (time.perf_counter() - started) / (step.index + 1)
                bar.set_postfix_str(f"{per_step:.2f} s/step", False)
                bar.update()
                if args.stepwise_dir is not None:
                    name = f"{slug(prompt)}-seed-{step.seed}-step-{step.index + 1:02d}.png"
                    save_picture(step.preview(), Path(args.stepwise_dir) / name)
                if step.final:
                    break
        path = save_picture(
            step.preview(), _target(args.output, prompt), step.metadata if args.metadata else None
        )
        _report(step, path, time.perf_counter() - started, per_step, args.json)


def _target(output: str | None, prompt: str) -> Path:
    """Where a picture goes when nothing is there yet."""
    if output is None or _is_folder(output):
        return Path(output or ".") / f"{slug(prompt)}.png"
    return Path(output)


def _report(
    step: GenerationStep, path: Path, seconds: float, per_step: float, as_json: bool
) -> None:
    if as_json:
        result = {"path": str(path), "seconds": round(seconds, 3)}
        result |= {"seconds_per_step": round(per_step, 3), **_peak_memory()}
        print(json.dumps(result | step.metadata), flush=True)
    else:
        print(f"{path} (seed {step.seed}, {seconds:.1f} s, {per_step:.2f} s/step)", flush=True)


def _peak_memory() -> dict[str, int]:
    """Bytes at the highest: of mlx arrays, and on the CPU of the whole process too."""
    peak = {"peak_mlx_bytes": mx.get_peak_memory()}
    if mx.default_device().type == mx.DeviceType.cpu:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def _print_vocabulary(folder: Path, as_json: bool) -> int:
    vocabulary = load_vocabulary(folder)
    if vocabulary is None:
        raise UserError(f"{folder} does not say which words it knows")
    if as_json:
        print(json.dumps(vocabulary, ensure_ascii=False))
    else:
        for category, words in vocabulary.items():
            print(f"{category.replace('_', ' ')} ({len(words)}): {', '.join(words)}\n")
    return 0


@contextmanager
def _notices() -> Iterator[None]:
    """Show warnings as one line on stderr."""

    def show(message, category, filename, lineno, file=None, line=None):
        tqdm.write(f"note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def command() -> None:
    """The console script `mlx-snapgen`."""
    run_command(main)


if __name__ == "__main__":
    command()
