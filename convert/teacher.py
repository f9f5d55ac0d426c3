"""Make a public flow model a teacher that `train.kd` and `train.kdmd` can learn from.

    python -m convert.teacher Qwen/Qwen-Image --output qwen-image --bits 4
    python -m convert.teacher Tongyi-MAI/Z-Image-Turbo --output z-image
    python -m convert.teacher Qwen/Qwen-Image --output qwen-image --bits 4 \\
        --few-step-lora Qwen-Image-Lightning-4steps-V1.0.safetensors

The source is a folder as diffusers has it, or a repository on Hugging Face. `--bits` stores the
matrices of the transformer's blocks quantized, tensor by tensor. `--transformer` takes one that
`convert.from_torch` wrote, where an interrupted conversion goes on; the source's is left alone.
"""

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from convert.public.convert import convert
from convert.public.keys.autoencoders import read_autoencoder
from convert.public.keys.transformers import make_transformer
from convert.public.source import find_source, read_object
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.language_models import QWEN_FILES
from mlx_snapgen.checkpoint.model import FEW_STEP
from mlx_snapgen.checkpoint.module import BITS, GROUP_SIZES, read_part
from mlx_snapgen.config import from_dict, to_dict
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new, new_folder
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.teachers.config import LIGHTNING, TRANSFORMERS, TURBO, Schedule, TeacherConfig
from mlx_snapgen.teachers.folder import CONFIG, FORMAT_VERSION, NETWORKS

SCHEDULES = {"qwen-image": (Schedule(), LIGHTNING), "z-image": (TURBO, TURBO)}
"""Kind of teacher -> its schedule and that of its few-step mode. Z-Image-Turbo is such a mode."""


def read_schedule(folder: Path, like: Schedule) -> Schedule:
    """Noise levels as scheduler_config.json in `folder` has them, all else as in `like`.

    Raises:
        UserError: another kind of schedule.
    """
    values = read_object(folder / "scheduler_config.json")
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if values.get(key):
            raise UserError(f"{folder}: a schedule with {key} is not supported")
    try:
        if values.get("use_dynamic_shifting"):
            if values.get("time_shift_type", "exponential") != "exponential":
                raise UserError(f"{folder}: only an exponential time shift is supported")
            shifts = values["base_shift"], values["max_shift"]
            tokens = values["base_image_seq_len"], values["max_image_seq_len"]
        else:
            shifts, tokens = (math.log(values["shift"]),) * 2, like.tokens
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{folder} does not describe a flow-matching schedule: {error!r}") from None
    return dataclasses.replace(
        like, log_shifts=shifts, tokens=tokens, terminal=values.get("shift_terminal") or 0.0
    )


def convert_teacher(
    source: Path,
    output: Path,
    quantization: dict[str, int] | None = None,
    few_step_lora: Path | None = None,
    text_encoder: str | None = None,
    transformer: Path | None = None,
) -> None:
    """Write the model in `source`, a folder of diffusers, as a teacher's folder.

    Args:
        output: must not exist yet, or be empty.
        quantization: {"bits", "group_size"} to store the transformer's blocks in; None keeps them.
        few_step_lora: of the few-step mode, a .safetensors file.
        text_encoder: where the language model is instead of in the teacher's folder.
        transformer: folder of `convert.from_torch` with the one to take instead of the source's.

    Raises:
        UserError: something is missing, unknown or does not fit; nothing is written then.
    """
    check_new(output)
    given = transformer if transformer is not None else source / "transformer"
    part = read_part(given, "transformer")
    if part is None:
        path = given / "config.json"
        kind, network = make_transformer(read_object(path), path)
    else:
        if quantization is not None:
            raise UserError(f"{given} is converted: it is quantized by convert.from_torch --bits")
        kind = part.config.pop("kind", None)
        if kind not in NETWORKS:
            raise UserError(f"{given} holds no teacher's transformer: it is of the kind {kind}")
        network = NETWORKS[kind](from_dict(TRANSFORMERS[kind], part.config))
        quantization = part.quantization
    autoencoder = read_autoencoder(source / "vae")
    if few_step_lora is not None:
        # The network's random weights are lazy: this is only whether the LoRA fits.
        load_lora(few_step_lora, network, weight=0.0, name=FEW_STEP)
    schedule, few_step = SCHEDULES[kind]
    schedule = read_schedule(source / "scheduler", schedule)
    if kind == "qwen-image" and few_step_lora is None:
        few_step = None
    config = TeacherConfig(
        kind=kind,
        transformer=network.config,
        autoencoder=autoencoder.config,
        schedule=schedule,
        few_step=few_step,
        quantization=quantization,
    )
    if text_encoder is not None:
        config = dataclasses.replace(config, text_encoder=text_encoder)
    with new_folder(output) as partial:
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (partial / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        weights = dict(tree_flatten(autoencoder.parameters()))
        mx.save_safetensors(str(partial / "autoencoder.safetensors"), weights, {"format": "mlx"})
        if part is None:
            converted = partial / "transformer"
            convert(find_source(str(given)), converted, kind, **(quantization or {}))
            _take(converted, partial, Path.rename)
            shutil.rmtree(converted)
        else:
            _take(given, partial, shutil.copyfile)
        if few_step_lora is not None:
            shutil.copyfile(few_step_lora, partial / f"{FEW_STEP}.safetensors")
        if text_encoder is None:
            for part in ("tokenizer", "text_encoder"):
                _copy(source / part, partial / config.text_encoder)


def _take(transformer: Path, folder: Path, move: Callable[[Path, Path], object]) -> None:
    """Put what `convert.from_torch` wrote of a transformer into the teacher's folder."""
    for name, new in (
        ("transformer.safetensors", "transformer-00001.safetensors"),
        ("report.json", "report.json"),
    ):
        if not (transformer / name).is_file():
            raise UserError(f"{transformer} is incomplete: {name} is missing")
        move(transformer / name, folder / new)


def _copy(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise UserError(f"{source.parent} is incomplete: it has no folder {source.name}")
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in QWEN_FILES):
            shutil.copyfile(path, target / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder or repository of a model in diffusers' format")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("--bits", type=int, choices=BITS, help="store the blocks quantized")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64)
    parser.add_argument("--few-step-lora", type=Path, help="for the few-step mode")
    parser.add_argument("--transformer", type=Path, help="folder of convert.from_torch to use")
    parser.add_argument(
        "--text-encoder",
        help="folder or repository of the language model, quantized perhaps, to use instead of "
        "the source's own",
    )
    args = parser.parse_args()
    quantization = {"bits": args.bits, "group_size": args.group_size} if args.bits else None
    source = find_model(args.source, files=QWEN_FILES)
    convert_teacher(
        source,
        args.output,
        quantization,
        args.few_step_lora,
        args.text_encoder,
        args.transformer,
    )
    print(args.output)


if __name__ == "__main__":
    run_command(main)
