"""Convert PyTorch weights: `python -m convert.from_torch SOURCE OUT`.

    python -m convert.from_torch Qwen/Qwen-Image qwen-vae --subfolder vae
    python -m convert.from_torch google/gemma-3-4b-it gemma --bits 4
    python -m convert.from_torch TinyCLIP.pt tinyclip --kind clip --dtype float16
    python -m convert.from_torch my-model-torch my-new-model --model my-model

SOURCE is a folder, a file (.safetensors, .bin, .pt) or a Hugging Face repository. OUT is a folder
with the weights, config.json, what the tokenizer needs and report.json, which accounts for every
key; a LoRA's is a .safetensors file. Weights pass tensor by tensor, so memory does not grow with
the checkpoint. Interrupted, the same command goes on where it was; until it is done nothing stands
at OUT. Files in a pickle are spooled beside OUT first, which takes their size on disk once more.

A folder of `convert.to_torch` becomes a model again, with what PyTorch has not from --model.
"""

import argparse
import sys
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split

from convert.public.convert import DTYPES, convert
from convert.public.kinds import KINDS, find_kind
from convert.public.report import summary
from convert.public.source import Source, find_source
from convert.pytorch.read_back import convert_student, is_student
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new

# --- the output ---------------------------------------------------------------------------------


# --- the weights --------------------------------------------------------------------------------


# --- the command -------------------------------------------------------------------------------


def _convert_student(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UserError(
            f"{args.source} is of convert.to_torch: name the model that it came from with --model, "
            "for what PyTorch has not"
        )
    how = None if args.bits is None else {"bits": args.bits, "group_size": args.group_size}
    folder, model = Path(args.source), find_model(args.model)
    report = convert_student(folder, model, args.out, DTYPES.get(args.dtype), how)
    keys = report["keys"]
    print(f"{args.out}: {len(keys['used'])} keys used, {len(keys['renamed'])} renamed")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.from_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="kinds:\n" + "\n".join(f"  {name:<16}{k.about}" for name, k in KINDS.items()),
    )
    parser.add_argument("source", help="folder, file or Hugging Face repository")
    parser.add_argument("out", type=Path, help="folder to write (a file for a LoRA)")
    parser.add_argument("--kind", help="what it is (default: found by its config and keys)")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--subfolder", help="part of a pipeline, such as vae")
    parser.add_argument("--dtype", choices=DTYPES, help="type to store (default: as it is)")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the matrices")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=32, help="default: 32"
    )
    parser.add_argument("--model", help="of a folder of convert.to_torch: the model it came from")
    args = parser.parse_args()
    if args.kind is not None:
        find_kind(Source(Path(args.source), Path(), (), None), {}, args.kind)
    check_new(args.out)
    if not (args.kind or args.revision or args.subfolder) and is_student(Path(args.source)):
        _convert_student(args)
        return
    if args.model is not None:
        raise UserError(f"{args.source} is none of convert.to_torch's: leave --model out")
    source = find_source(args.source, args.revision, args.subfolder)
    try:
        report = convert(
            source,
            args.out,
            args.kind,
            DTYPES.get(args.dtype),
            args.bits,
            args.group_size,
            args.revision,
        )
    except KeyboardInterrupt:
        print(f"nothing is at {args.out} yet: run the same command again to go on", file=sys.stderr)
        raise
    print(summary(report, args.out))


if __name__ == "__main__":
    run_command(main)
