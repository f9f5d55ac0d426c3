"""Write a public flow model as a teacher's folder (see `mlx_snapgen.teachers.folder`)."""

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx.utils import tree_flatten

from mlx_snapgen.checkpoint.language_models import TEXT_FILES, load_qwen
from mlx_snapgen.checkpoint.model import FEW_STEP
from mlx_snapgen.checkpoint.module import Part, read_part
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.files import check_new, expanded, new_folder, save_tensors, temporary_folder
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.json_values import check_only, checked, from_dict, to_dict
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.presets import PIXELS
from mlx_snapgen.public.convert import convert, read_plan
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.public.keys.transformers import make_transformer
from mlx_snapgen.public.kinds import Plan
from mlx_snapgen.public.source import find_source, part_source
from mlx_snapgen.public_config import MiniT2ITransformerConfig
from mlx_snapgen.reading import check_regular, read_object
from mlx_snapgen.teachers.config import (
    KLEIN,
    KLEIN_BASE,
    LIGHTNING,
    MINIT2I,
    MINIT2I_L,
    TRANSFORMERS,
    TURBO,
    Z_IMAGE,
    Schedule,
    TeacherConfig,
)
from mlx_snapgen.teachers.folder import FORMAT_VERSION, NETWORKS, PROMPT_FORMATS, TeacherNetwork
from mlx_snapgen.tensor_files import read_header

SCHEDULES = {
    "qwen-image": (Schedule(), LIGHTNING),
    "z-image": (Z_IMAGE, TURBO),
    "flux2": (KLEIN_BASE, KLEIN),
}
"""Kind of teacher -> its schedule, and that of its few-step mode or distilled version."""

TEXT_KINDS = {"qwen-image": "qwen", "z-image": "qwen", "flux2": "qwen", "minit2i": "t5"}
"""Kind of teacher -> kind of its text encoder, for `convert`."""


def read_schedule(folder: Path, like: Schedule) -> Schedule:
    """`like` with the noise levels of scheduler_config.json in `folder`.

    Raises:
        UserError: an unsupported kind of schedule.
    """
    path = folder / "scheduler_config.json"
    values = read_object(path)
    flags = (*(f"use_{k}_sigmas" for k in ("karras", "exponential", "beta")), "invert_sigmas")
    only = dict.fromkeys((*flags, "stochastic_sampling"), (False,))
    only |= {"_class_name": ("FlowMatchEulerDiscreteScheduler",), "num_train_timesteps": (1000,)}
    check_only(values, only, path)
    with naming(path):
        try:
            if values.get("use_dynamic_shifting"):
                if values.get("time_shift_type", "exponential") != "exponential":
                    raise UserError("only an exponential time shift is supported")
                shifts = values["base_shift"], values["max_shift"]
                tokens = values["base_image_seq_len"], values["max_image_seq_len"]
            else:
                if not values["shift"] > 0:
                    raise UserError(f"'shift' must be positive, got {values['shift']}")
                shifts, tokens = (math.log(values["shift"]),) * 2, like.tokens
                like = dataclasses.replace(like, is_empirical=False)
            terminal = values.get("shift_terminal") or 0.0
            return checked(
                dataclasses.replace(like, log_shifts=shifts, tokens=tokens, terminal=terminal)
            )
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"does not describe a flow-matching schedule: {error!r}") from None


@dataclass(frozen=True)
class TeacherParts:
    """Where parts of a teacher come from; those that are None come from its model's folder."""

    transformer: Path | None = None
    """Folder of `convert.from_torch`."""
    file: Path | None = None
    """Has the weights of the transformer."""
    few_step_lora: Path | None = None
    """.safetensors file of the few-step mode."""
    few_step_model: Path | None = None
    """The distilled model whose transformer is the few-step mode, as a folder in diffusers' format;
    or a folder of `convert.from_torch` with that transformer."""
    text_encoder: str | None = None
    """Folder or repository of a language model to use instead of a copy of the model's."""
    text_source: Path | None = None
    """Folder with the text encoder."""
    text_part: Path | None = None
    """Folder of `convert.from_torch` to copy as text encoder."""
    move: bool = False
    """Move the files of `transformer` and `text_part` instead of copying them."""


@dataclass(frozen=True)
class _Checked:
    """Parts that fit together, as `_check_parts` finds them."""

    config: TeacherConfig
    autoencoder: Autoencoder
    networks: dict[str, tuple[Path, Part | None]]
    """Name of a mode's network -> its folder, and the part if it is converted already."""
    text: Path
    """Folder of the text encoder."""


def convert_teacher(
    source: Path,
    output: Path,
    parts: TeacherParts | None = None,
    *,
    quantization: dict[str, int] | None = None,
) -> None:
    """Write the model in `source`, a folder in diffusers' format, as a teacher's folder.

    Args:
        output: must not exist, or be empty.
        quantization: {"bits", "group_size"} of the transformer's blocks; None does not quantize.

    Raises:
        UserError: a part is missing, unknown or does not fit; nothing is written then.
    """
    check_new(output)
    parts, work = parts or TeacherParts(), expanded(output).parent
    checked = _check_parts(source, parts, quantization=quantization, work=work)
    with new_folder(output) as partial:
        _write_parts(source, partial, parts, checked)


def _check_parts(
    source: Path, parts: TeacherParts, *, quantization: dict[str, int] | None, work: Path
) -> _Checked:
    given = source / "transformer" if parts.transformer is None else parts.transformer
    kind, network, part = read_network(given)
    if part is not None:
        if quantization is not None:
            raise UserError(
                f"{given} is converted already: quantize it with convert.from_torch --quantize"
            )
        quantization = part.quantization
    networks = {"transformer": (given, part)}
    if parts.few_step_model is not None:
        if parts.few_step_lora is not None:
            raise UserError("give a LoRA or a model for the few-step mode, not both")
        folder, part = few_step_network(parts.few_step_model, network)
        if part is not None and part.quantization != quantization:
            raise UserError(
                f"{folder} is quantized as {part.quantization}, the teacher's transformer as "
                f"{quantization}: convert both alike"
            )
        networks[FEW_STEP] = folder, part
    text = parts.text_source or source / "text_encoder"
    if parts.text_encoder is None and parts.text_part is None:
        check_text_encoder(text, source / "tokenizer", network=network, work=work)
    is_minit2i = kind == "minit2i"
    autoencoder = make_autoencoder(PIXELS) if is_minit2i else read_autoencoder(source / "vae")
    if parts.few_step_lora is not None:
        # Only checks that the LoRA fits: the network's random weights are lazy.
        load_lora(parts.few_step_lora, network, weight=0.0, name=FEW_STEP)
    has_few_step = parts.few_step_lora is not None or parts.few_step_model is not None
    schedule, few_step = read_schedules(source, network, has_few_step=has_few_step)
    with naming(source):
        config = TeacherConfig(
            kind=kind,
            transformer=network.config,
            autoencoder=autoencoder.config,
            schedule=schedule,
            few_step=few_step,
            quantization=quantization,
        )
    if parts.text_encoder is not None:
        config = dataclasses.replace(config, text_encoder=parts.text_encoder)
    return _Checked(config, autoencoder, networks, text)


def _write_parts(source: Path, output: Path, parts: TeacherParts, checked: _Checked) -> None:
    config, converted = checked.config, output / "converted"
    values = {"format_version": FORMAT_VERSION} | to_dict(config)
    (output / CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
    if weights := dict(tree_flatten(checked.autoencoder.parameters())):
        save_tensors(output / "autoencoder.safetensors", weights, {"format": "mlx"})
    for name, (folder, part) in checked.networks.items():
        if part is None:
            weights = part_source(folder, parts.file if name == "transformer" else None)
            convert(weights, converted, kind=config.kind, quantization=config.quantization)
            _take(converted, output, name=name, move=Path.rename)
            shutil.rmtree(converted)
        else:
            _take(folder, output, name=name, move=Path.rename if parts.move else shutil.copyfile)
    if parts.few_step_lora is not None:
        shutil.copyfile(parts.few_step_lora, output / f"{FEW_STEP}.safetensors")
    if parts.text_encoder is not None:
        return
    text, is_mine = parts.text_part or checked.text, parts.text_part is not None and parts.move
    is_minit2i = config.kind == "minit2i"
    if parts.text_part is None and (is_minit2i or is_fp8(text)):
        # mlx-lm reads no FP8, and a T5 has a decoder, which is not needed.
        convert(find_source(str(text)), converted, kind=TEXT_KINDS[config.kind])
        text, is_mine = converted, True
    target = output / config.text_encoder
    if not is_minit2i:
        _copy(source / "tokenizer", target, put=shutil.copyfile)
    _copy(text, target, put=Path.rename if is_mine else shutil.copyfile)
    shutil.rmtree(converted, ignore_errors=True)


def check_text_encoder(
    folder: Path, tokenizer: Path, *, network: TeacherNetwork, work: Path
) -> Plan:
    """The plan of a text encoder's conversion.

    Only configs and headers are read: conversions take minutes.

    Args:
        folder: of the text encoder.
        tokenizer: its folder; not of a T5, which has its own.
        network: the transformer.
        work: folder for temporary links.

    Raises:
        UserError: a text encoder or tokenizer that is damaged or does not fit.
    """
    kind = next(kind for kind, made in NETWORKS.items() if isinstance(network, made))
    _, plan, _ = read_plan(find_source(str(folder)), TEXT_KINDS[kind], spool=folder)
    # mlx-lm reads no FP8.
    if TEXT_KINDS[kind] == "t5" or importlib.util.find_spec("mlx_lm") is None or is_fp8(folder):
        return plan
    paths: dict[Path, Path] = {}

    def link(path: Path, place: Path) -> None:
        place.unlink(missing_ok=True)
        place.symlink_to(path.absolute())
        paths[place] = path

    with temporary_folder(work) as together:
        for one in (tokenizer, folder):
            _copy(one, together, put=link)
        try:
            load_qwen(together, PROMPT_FORMATS[kind], dims=network.config.text_dims)
        except UserError as error:
            text = error.uncut
            for place, path in (paths | {together: folder.parent}).items():
                text = text.replace(str(place), str(path))
            raise UserError(text) from None
    return plan


def is_fp8(folder: Path) -> bool:
    """Whether some weights in a folder are stored in FP8."""
    return any(
        tensor.dtype == "F8_E4M3"
        for path in folder.glob("*.safetensors")
        for tensor in read_header(path)[0].values()
    )


def read_network(given: Path) -> tuple[str, TeacherNetwork, Part | None]:
    """Kind, network with random weights, and part if `convert.from_torch` wrote the folder."""
    part = read_part(given, "transformer")
    if part is None:
        path = given / "config.json"
        return *make_transformer(read_object(path), path), None
    kind = part.config.pop("kind", None)
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise UserError(f"{given} is not a teacher's transformer, but a {kind}")
    with naming(given / "config.json"):
        return kind, NETWORKS[kind](from_dict(TRANSFORMERS[kind], part.config)), part


def few_step_network(model: Path, like: TeacherNetwork) -> tuple[Path, Part | None]:
    """Folder and part of the few-step transformer; `UserError` if it differs from `like`."""
    converted = read_part(model, "transformer") is not None
    folder = model if converted else model / "transformer"
    _, network, part = read_network(folder)
    if network.config != like.config:
        raise UserError(
            f"{folder} is another network than the teacher's transformer: their configs differ"
        )
    return folder, part


def read_schedules(
    source: Path, network: TeacherNetwork, *, has_few_step: bool
) -> tuple[Schedule, Schedule | None]:
    """Schedule of the model in `source` with this transformer, and of its few-step mode."""
    kind = next(kind for kind, made in NETWORKS.items() if isinstance(network, made))
    if kind == "minit2i":
        return _minit2i_schedule(source / "scheduler", network.config.hidden_size), None
    schedule, few_step = SCHEDULES[kind]
    found = read_schedule(source / "scheduler", schedule)
    # Networks of a model and its distilled version have the same config.
    if kind == "flux2":
        index = source / "model_index.json"
        is_distilled = index.is_file() and bool(read_object(index).get("is_distilled"))
        few_step = read_schedule(source / "scheduler", few_step)
    else:
        is_distilled = kind == "z-image" and found.log_shifts != Z_IMAGE.log_shifts
    if is_distilled:
        few_step = read_schedule(source / "scheduler", few_step)
        return few_step, few_step
    return found, few_step if has_few_step else None


def _minit2i_schedule(folder: Path, hidden_size: int) -> Schedule:
    """MiniT2I's; its steps are in scheduler_config.json if there is one."""
    schedule = MINIT2I if hidden_size <= MiniT2ITransformerConfig().hidden_size else MINIT2I_L
    path = folder / "scheduler_config.json"
    if not path.is_file():
        return schedule
    steps = read_object(path).get("num_inference_steps", schedule.num_inference_steps)
    try:
        return checked(dataclasses.replace(schedule, num_inference_steps=steps))
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _take(
    transformer: Path, folder: Path, *, name: str, move: Callable[[Path, Path], object]
) -> None:
    """Put the files that `convert.from_torch` wrote of a transformer into the teacher's folder."""
    report = "report.json" if name == "transformer" else f"{name}_report.json"
    for old, new in (
        ("transformer.safetensors", f"{name}-00001.safetensors"),
        ("report.json", report),
    ):
        if not (transformer / old).is_file():
            raise UserError(f"{transformer} is incomplete: {old} is missing")
        move(transformer / old, folder / new)


def _copy(source: Path, target: Path, *, put: Callable[[Path, Path], object]) -> None:
    if not source.is_dir():
        raise UserError(f"{source.parent} is incomplete: it has no folder {source.name}")
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in TEXT_FILES):
            check_regular(path)
            put(path, target / path.name)
