"""Convert PyTorch weights: `python -m convert.from_torch SOURCE OUT`.

    python -m convert.from_torch Qwen/Qwen-Image qwen-vae --subfolder vae
    python -m convert.from_torch google/gemma-3-4b-it gemma --quantize 4
    python -m convert.from_torch TinyCLIP.pt tinyclip --kind clip --dtype float16
    python -m convert.from_torch my-model-torch my-new-model --model my-model

SOURCE is a folder, a file (.safetensors, .bin, .pt) or a Hugging Face repository. OUT is a new
folder with the weights, config.json, the tokenizer files and report.json, which lists every key.
For a LoRA, OUT is a .safetensors file. The command converts one tensor after another, so memory
does not grow with the checkpoint. Run the same command again to resume an interrupted conversion;
OUT is renamed into place when complete. The command first copies a pickle (.bin, .pt) to
safetensors beside OUT, which needs as much disk space as the pickle.

If SOURCE is a folder of `convert.to_torch`, OUT is a model folder. The command then copies the
parts that PyTorch does not have from --model.
"""

import argparse
import sys
from pathlib import Path

from convert.options import add_output, add_quantize, parse
from convert.pickles import spooled
from convert.pytorch.read_back import convert_student, is_student
from convert.report import summary
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.public.convert import DTYPES, convert
from mlx_snapgen.public.kinds import KINDS, find_kind
from mlx_snapgen.public.source import Source, find_source
from mlx_snapgen.settings import BUILT_IN


def _quantization(args: argparse.Namespace) -> dict[str, int] | None:
    how = {"bits": args.quantize, "group_size": args.group_size}
    return how if args.quantize else None


def _convert_student(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UserError(
            f"{args.source} was written by convert.to_torch: name the model that it came from with "
            "--model, for the parts that PyTorch does not have"
        )
    report = convert_student(
        Path(args.source),
        ModelFolder.open(args.model).path,
        args.output,
        dtype=DTYPES.get(args.dtype),
        quantization=_quantization(args),
    )
    keys = report["keys"]
    print(f"{args.output}: {len(keys['used'])} keys used, {len(keys['renamed'])} renamed")


def make_parser() -> Parser:
    kinds = "\n".join(f"  {name:<16}{kind.about}" for name, kind in KINDS.items())
    parser = Parser(
        prog="python -m convert.from_torch",
        description=__doc__,
        epilog=f"kinds:\n{kinds}",
        renamed={"--bits": "--quantize"},
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="folder, file or Hugging Face repository to convert"
    )
    add_output(parser, "folder to write (for a LoRA a .safetensors file)")
    parser.add_argument("--kind", help="kind of network, see below (default: detected)")
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit of a repository (default: main)",
    )
    parser.add_argument(
        "--subfolder", metavar="NAME", help="folder inside SOURCE, such as vae (default: none)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the stored numbers (default: as in SOURCE)"
    )
    add_quantize(parser, "the matrices")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        default=32,
        help="weights per quantization scale (default: 32)",
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="needed if convert.to_torch wrote SOURCE: the original model, as folder, Hugging Face "
        f"repository, or {BUILT_IN} for the built-in one (default: none)",
    )
    return parser


def main() -> None:
    args = parse(make_parser())
    if args.kind is not None:
        find_kind(Source(Path(args.source), Path(), (), None), {}, args.kind)
    check_new(args.output)
    if not (args.kind or args.revision or args.subfolder) and is_student(Path(args.source)):
        _convert_student(args)
        return
    if args.model is not None:
        raise UserError(f"{args.source} was not written by convert.to_torch: omit --model")
    source = find_source(
        args.source,
        args.revision,
        subfolder=args.subfolder,
        spool=spooled,
        # One without a config is known by its keys.
        check=lambda described: args.kind or find_kind(described, {}),
    )
    try:
        report = convert(
            source,
            args.output,
            kind=args.kind,
            dtype=DTYPES.get(args.dtype),
            quantization=_quantization(args),
            revision=args.revision,
        )
    except KeyboardInterrupt:
        print(f"{args.output} is not complete: run the same command to resume", file=sys.stderr)
        raise
    print(summary(report, args.output))


if __name__ == "__main__":
    run_command(main)
