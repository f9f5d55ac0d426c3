"""Draw pictures from the command line: `python -m mlx_snapgen.generate "a red apple"`."""

import argparse
import json
import math
import os
import re
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

from mlx_snapgen.config import WIDTH_NAMES
from mlx_snapgen.errors import UserError, nearest, run_command
from mlx_snapgen.hub import find_model
from mlx_snapgen.metadata import read_metadata, save_picture
from mlx_snapgen.pipeline import (
    MAX_SEED,
    MAX_STEPS,
    GenerationStep,
    SnapGenPipeline,
    check_size,
    check_width,
)
from mlx_snapgen.text_encoder import normalise
from mlx_snapgen.weights import load_config, load_vocabulary

EXAMPLES = """
examples:
  python -m mlx_snapgen.generate "a red apple to the left of a blue car"
  python -m mlx_snapgen.generate "three cats" --num-images 4 --seed 7 --output cats/
  python -m mlx_snapgen.generate "a purple car" --model-width tiny --steps 12 --guidance 3
  python -m mlx_snapgen.generate "two owls" --negative-prompt "a yellow background"
  python -m mlx_snapgen.generate "a purple car" --lora crayons.safetensors 0.8
  python -m mlx_snapgen.generate --config-from-image a-purple-car.png --steps 40
  python -m mlx_snapgen.generate --prompts-file prompts.txt --output pictures/ --json

--width and --height are the picture's, in pixels; --model-width is the share of the network that
draws it. A picture that exists is never overwritten: the next is called name-1.png. Mistakes exit
with code 2 and one line that says what to do.
"""

RECORDED: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "few_step": (bool,),
    "attention_modulation": (bool,),
    "height": (int,),
    "width": (int,),
    "model": (str, type(None)),
    "revision": (str, type(None)),
    "model_width": (str,),
    "quantize": (int, type(None)),
    "loras": (list,),
}
"""Options that `--config-from-image` takes over, and what they are in a picture's metadata."""


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as all errors here."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            first = message.split()[2]
            if first.startswith("-"):
                message = f"unknown option {first}{nearest(first, self._option_string_actions)}"
            else:
                message = f"unexpected '{first}': put the whole prompt in quotes"
        raise UserError(f"{message}; see --help")


class _LoRAs(argparse.Action):
    """`--lora PATH [SCALE]`, any number of times -> [(path, scale), ...]."""

    def __call__(self, parser, namespace, values, option_string=None):
        path, *scales = values
        try:
            if len(scales) > 1:
                raise argparse.ArgumentTypeError(f"'{scales[1]}' follows a file and its scale")
            pair = path, _finite(scales[0]) if scales else 1.0
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"{error} (prompts go before it)") from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), pair])


def _pixels(text: str) -> int:
    if text in WIDTH_NAMES:
        raise argparse.ArgumentTypeError(
            f"takes pixels; to choose the network's width use --model-width {text}"
        )
    return _whole_number(1)(text)


def _model_width(text: str) -> str:
    if text not in WIDTH_NAMES:
        hint = "; the picture's width in pixels is --width" if text.isdigit() else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not full, small or tiny{hint}")
    return text


def _whole_number(least: int, most: int = MAX_SEED):
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"a whole number expected, not '{text}'") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{number} is not between {least} and {most}")
        return number

    return parse


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number expected, not '{text}'") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError("a finite number expected")
    return number


def build_parser() -> argparse.ArgumentParser:
    """The command's options. All default to None where a picture or the model may know better."""
    parser = _Parser(
        prog="python -m mlx_snapgen.generate",
        description="Draw pictures from a sentence.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    picture = parser.add_argument_group("picture")
    add = picture.add_argument
    add("--negative-prompt", metavar="TEXT", help="what to keep out (not at --guidance 1)")
    add("--height", type=_pixels, metavar="PX", help="pixels (default: the model's own size)")
    add("--width", type=_pixels, metavar="PX", help="pixels; for the network see --model-width")
    add("--seed", type=_whole_number(0), help="start of the noise (default: random, then printed)")
    add(
        "--num-images", type=_whole_number(1), default=1, metavar="N", help="seeds SEED .. SEED+N-1"
    )
    add(
        "--steps",
        dest="num_inference_steps",
        type=_whole_number(1, MAX_STEPS),
        metavar="N",
        help="denoising steps; fewer is faster and rougher (default: the model's)",
    )
    add(
        "--few-step",
        action=argparse.BooleanOptionalAction,
        help="use the model's few-step mode, if it has one (default: up to twice its own steps)",
    )
    add(
        "--guidance",
        dest="guidance_scale",
        type=_finite,
        metavar="G",
        help="how hard to follow the prompt; 1 is off and twice as fast (default: the model's)",
    )
    add(
        "--attention-modulation",
        action=argparse.BooleanOptionalAction,
        help="let some blocks look harder at what is near them, as EDT does (default: no)",
    )
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", metavar="M", help="folder or Hugging Face repository (default: stickers)")
    add("--revision", metavar="R", help="branch, tag or commit of the repository")
    add(
        "--model-width",
        type=_model_width,
        metavar="W",
        help="share of the network to use: full, small (1/2) or tiny (3/8) (default: full)",
    )
    add(
        "--quantize",
        type=int,
        choices=(0, 4, 8),
        help="bits per weight in memory; 0 is off (default). Saves memory on a GPU; the CPU only "
        "shows what it does to pictures",
    )
    add(
        "--lora",
        dest="loras",
        action=_LoRAs,
        nargs="+",
        metavar=("PATH", "SCALE"),
        help="a .safetensors LoRA file and how strongly to apply it (default: 1); may be repeated",
    )
    add("--vocabulary", action="store_true", help="print the words the model knows and exit")
    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "-o",
        "--output",
        metavar="PATH",
        help="a .png file, or a folder (ending in /); missing folders are made (default: named "
        "after the prompt, here)",
    )
    add("--prompts-file", metavar="FILE", help="a prompt per line, # for comments, - for stdin")
    add(
        "--config-from-image",
        metavar="PNG",
        help="draw the picture again from what it knows of itself; options given here win",
    )
    add(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep prompt and settings inside the picture (default: yes)",
    )
    add("--stepwise-dir", metavar="DIR", help="also save what each step expects to see at the end")
    add("--json", action="store_true", help="print one JSON object per picture, and nothing else")
    return parser


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


def _check(args: argparse.Namespace) -> None:
    """All that can be wrong before a model is there."""
    if args.prompts_file is None and args.prompt is None:
        raise UserError('say what to draw: python -m mlx_snapgen.generate "a red apple"')
    if args.prompts_file is None and not args.prompt.strip():
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
    # What older pictures do not know of, they were drawn without.
    older = {"loras": [], "few_step": False, "attention_modulation": False}
    origin = older | read_metadata(args.config_from_image)
    try:
        origin["loras"] = [(str(x["path"]), float(x["weight"])) for x in origin["loras"]]
    except (TypeError, ValueError, LookupError):
        origin["loras"] = None
    explicit_model = args.model is not None
    for key, kinds in RECORDED.items():
        if key not in origin or not isinstance(origin[key], kinds):
            raise UserError(f"{args.config_from_image} has no usable '{key}' in its settings")
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
        args.model, args.revision, model_width, args.quantize or None, dtype, args.loras or ()
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
        _report(step, path, time.perf_counter() - started, args.json)


def _target(output: str | None, prompt: str) -> Path:
    """Where a picture goes when nothing is there yet."""
    if output is None or _is_folder(output):
        return Path(output or ".") / f"{slug(prompt)}.png"
    return Path(output)


def slug(prompt: str) -> str:
    """A file name out of a prompt: "A red apple!" -> "a-red-apple"."""
    words = "-".join(re.findall(r"\w+", normalise(prompt)))
    # Names are limited in bytes, and a letter may have several.
    short = words.encode()[:80].decode(errors="ignore").strip("-_")
    return short or "snapgen"


def _report(step: GenerationStep, path: Path, seconds: float, as_json: bool) -> None:
    if as_json:
        result = {"path": str(path), "seconds": round(seconds, 3), **_peak_memory()}
        print(json.dumps(result | step.metadata), flush=True)
    else:
        print(f"{path} (seed {step.seed}, {seconds:.1f} s)", flush=True)


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


if __name__ == "__main__":
    run_command(main)
