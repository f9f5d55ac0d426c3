"""A teacher on disk: a folder that `convert.teacher` writes.

teacher.json                 TeacherConfig, and `format_version`
transformer-00001.safetensors, ...  the network, in as many files as it came in
few_step.safetensors         optional: the LoRA of its few-step mode
few_step-00001.safetensors, ...     optional: the network's weights in its few-step mode
autoencoder.safetensors
text_encoder/                the language model and its tokenizer, unless the config names
                             another place
A model that draws pixels has no autoencoder.safetensors.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.hub import find_model, of_text_encoder
from mlx_snapgen.checkpoint.language_models import TEXT_FILES, check_kind, load_qwen
from mlx_snapgen.checkpoint.model import FEW_STEP
from mlx_snapgen.checkpoint.module import (
    Part,
    cast,
    check_quantization,
    check_version,
    dequantize_on_cpu,
    load_stored,
    on_device,
)
from mlx_snapgen.checkpoint.t5 import load_t5
from mlx_snapgen.errors import ModelError, UserError, naming
from mlx_snapgen.formats import CONFIG
from mlx_snapgen.lora.files import load_lora
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.flux2 import Flux2Transformer
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.minit2i import MiniT2ITransformer
from mlx_snapgen.networks.qwen_image import QwenTransformer
from mlx_snapgen.networks.text_encoders.base import PublicTextEncoder
from mlx_snapgen.networks.text_encoders.qwen import FLUX2_KLEIN, QWEN_IMAGE, Z_IMAGE
from mlx_snapgen.networks.text_encoders.t5 import FLAN_T5
from mlx_snapgen.networks.z_image import ZImageTransformer
from mlx_snapgen.reading import read_object
from mlx_snapgen.teachers.config import TeacherConfig, teacher_config
from mlx_snapgen.teachers.flow import FlowTeacher

FORMAT_VERSION = 1

NETWORKS = {
    "qwen-image": QwenTransformer,
    "z-image": ZImageTransformer,
    "flux2": Flux2Transformer,
    "minit2i": MiniT2ITransformer,
}
PROMPT_FORMATS = {
    "qwen-image": QWEN_IMAGE,
    "z-image": Z_IMAGE,
    "flux2": FLUX2_KLEIN,
    "minit2i": FLAN_T5,
}
"""`TeacherConfig.kind` -> class of the transformer, and how its prompts are encoded."""

TeacherNetwork = QwenTransformer | ZImageTransformer | Flux2Transformer | MiniT2ITransformer


@dataclass(frozen=True)
class TeacherFolder:
    """A public model on disk, ready to be loaded."""

    path: Path
    config: TeacherConfig
    source: str | None = None
    """The folder or repository that the user named."""
    revision: str | None = None
    """Commit of a repository."""
    quantize: int | None = None
    """Bits of this conversion of `source`; None if `source` is what was converted."""


def cache_folder() -> Path:
    """Folder of converted models: $MLX_SNAPGEN_CACHE, or mlx_snapgen in the user's cache."""
    given = os.environ.get("MLX_SNAPGEN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_snapgen"


@contextmanager
def _way_out(folder: Path) -> Iterator[None]:
    """Errors name a folder of the cache, because deleting it converts the model again."""
    try:
        yield
    except UserError as error:
        if folder.parent != cache_folder():
            raise ModelError(error) from None
        reason = re.sub(r"[:,] (get it again|python -m .*)$", "", str(error))
        reason = reason.replace(f"{folder}/", "")
        raise ModelError(
            f"delete {folder} and run the command again: it is damaged ({reason})"
        ) from None


def load_flow_teacher(
    folder: Path, *, lazy: bool = False, dtype: mx.Dtype | None = None
) -> tuple[FlowTeacher, Autoencoder]:
    """A public teacher and its autoencoder.

    Quantized layers stay packed.

    Args:
        dtype: floating type of transformer and text encoder; None selects float32 on the CPU, and
            the stored type on a GPU. The autoencoder is float32.
        lazy: read the weights of transformer and autoencoder when they are first used, so that the
            text encoder can be freed before. Not for compiled functions.

    Raises:
        UserError: no teacher, or its weights are damaged, missing, unknown or misshapen.
    """
    config = load_teacher_config(folder)
    dtype = on_device(dtype)
    network, few_step = load_networks(folder, config, dtype=dtype)
    autoencoder = load_teacher_autoencoder(folder, config)
    for module in (network, few_step, autoencoder):
        if module is not None and not lazy:
            mx.eval(module.parameters())
    prompts = load_prompts(folder, config, dtype=dtype)
    teacher = FlowTeacher(config, network, prompts=prompts, few_step_network=few_step)
    return teacher, autoencoder


def load_teacher_config(folder: Path) -> TeacherConfig:
    """`teacher.json` of a folder; `UserError` when it is missing, foreign or too new."""
    with _way_out(folder):
        return _read_config(folder)


def _read_config(folder: Path) -> TeacherConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder} is not a teacher: no {CONFIG}. python -m convert.teacher makes one"
        )
    values = read_object(path)
    check_version(folder, values.pop("format_version", None), reads=FORMAT_VERSION)
    with naming(path):
        config = teacher_config(values)
        if config.quantization is not None:
            check_quantization({"transformer": config.quantization}, ["transformer"])
        return config


def load_networks(
    folder: Path, config: TeacherConfig, *, dtype: mx.Dtype | None
) -> tuple[nn.Module, nn.Module | None]:
    """The network, and that of the few-step mode if it is another one; lazily."""
    network = load_network(folder, config, dtype=dtype)
    if not any(folder.glob(f"{FEW_STEP}-*.safetensors")):
        return network, None
    return network, load_network(folder, config, dtype=dtype, name=FEW_STEP)


def load_network(
    folder: Path,
    config: TeacherConfig,
    *,
    dtype: mx.Dtype | None = None,
    name: str = "transformer",
) -> nn.Module:
    """A network of the teacher, lazily.

    Args:
        name: "transformer", with its few-step LoRA, switched off, where there is one; or `FEW_STEP`
            for the network of the few-step mode.
    """
    network = NETWORKS[config.kind](config.transformer)
    with _way_out(folder):
        paths = tuple(sorted(folder.glob(f"{name}-*.safetensors")))
        if not paths:
            raise UserError(f"{folder} is incomplete: it has no {name}-*.safetensors")
        part = Part(paths, config.transformer, config.quantization)
        load_stored(network, part, packed=True)
    dequantize_on_cpu(network)
    cast(network, dtype)
    network.freeze()
    path = folder / f"{FEW_STEP}.safetensors"
    if name != FEW_STEP and path.is_file():
        load_lora(path, network, weight=0.0, name=FEW_STEP)
    return network


def load_teacher_autoencoder(folder: Path, config: TeacherConfig) -> Autoencoder:
    """The autoencoder, lazily, in float32."""
    autoencoder = make_autoencoder(config.autoencoder)
    if not flat_parameters(autoencoder):
        return autoencoder
    part = Part((folder / "autoencoder.safetensors",), config.autoencoder, None)
    with _way_out(folder):
        load_stored(autoencoder, part)
    cast(autoencoder, mx.float32)
    return autoencoder


def load_prompts(
    folder: Path, config: TeacherConfig, *, dtype: mx.Dtype | None
) -> PublicTextEncoder:
    """The text encoder, in the teacher's folder or at the place in its config."""
    prompt_format = PROMPT_FORMATS[config.kind]
    load = load_t5 if prompt_format is FLAN_T5 else load_qwen
    with _way_out(folder):
        source = folder / config.text_encoder
        if not source.is_dir():
            with of_text_encoder(folder, named=f"text_encoder in {folder.name}/{CONFIG}"):
                source = find_model(
                    config.text_encoder,
                    files=TEXT_FILES,
                    check=lambda found: check_kind(found, prompt_format),
                )
        return load(source, prompt_format, dims=config.transformer.text_dims, dtype=dtype)


def quantizable(network: TeacherNetwork, group_size: int) -> set[str]:
    """Keys of the weights that may be stored quantized: the matrices inside the blocks."""
    return {
        key
        for key, value in flat_parameters(network).items()
        if key.split(".")[0] in network.BLOCKS
        and value.ndim == 2
        and value.shape[-1] % group_size == 0
    }
