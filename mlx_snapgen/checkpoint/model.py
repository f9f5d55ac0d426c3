"""The checkpoint format: a model is a folder, written whole or not at all, loaded strictly.

    config.json                  ModelConfig, and `format_version`
    transformer.safetensors      every width of the supernetwork
    few_step.safetensors         optional: the LoRA of its few-step mode (`config.few_step`)
    autoencoder.safetensors
    text_encoder_0.safetensors   one per text encoder, with its tokenizer_0.model; none for encoders
                                 whose config names a source
    vocabulary.json              optional: words of prompts, {"nouns": ["apple", ...], ...}

Weights may be stored quantized (`X.weight` packed, `X.scales`, `X.biases`, as `mx.quantize` gives
them), recorded in config.json as `{"transformer": {"bits": 4, "group_size": 32}}`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.checkpoint.config import Model, ModelFolder, load_vocabulary
from mlx_snapgen.checkpoint.module import (
    EIGHT_BITS,
    FORMAT_VERSION,
    Quantization,
    check_quantization,
    even_steps,
    file_matrices,
    load_stored,
    materialize,
    on_device,
    read_part,
)
from mlx_snapgen.checkpoint.text_encoders import chosen_encoders, load_text_encoder
from mlx_snapgen.cli.notices import write_line
from mlx_snapgen.config import AutoencoderConfig, ModelConfig
from mlx_snapgen.errors import UserError, naming
from mlx_snapgen.files import check_new, expanded, is_unicode, new_folder, save_tensors
from mlx_snapgen.json_values import from_dict, to_dict
from mlx_snapgen.lora.adapters import (
    adapted_layers,
    fuse_lora,
    get_lora_weights,
    set_lora_weights,
    without_lora,
)
from mlx_snapgen.lora.files import check_lora_width, load_lora, save_lora
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.settings import parse_width

FEW_STEP = "few_step"
"""Name of the transformer's adapter for the few-step mode."""


def untrained_note(
    network: EfficientDiT, model: str | Path, *, result: str = "it draws noise"
) -> str | None:
    """A line if a network has its first weights, as `train.new` writes them; else None."""
    return f"{model} is not trained yet: {result}" if network.is_untrained else None


def warn_untrained(
    network: EfficientDiT, model: str | Path, *, result: str = "it draws noise"
) -> None:
    """Print the note of `untrained_note`, if there is one, in one of the processes of a run."""
    note = untrained_note(network, model, result=result)
    if note and mx.distributed.init().rank() == 0:
        write_line(f"warning: {note}")


@dataclasses.dataclass(kw_only=True)
class Components:
    """A model in memory."""

    config: ModelConfig
    transformer: EfficientDiT
    autoencoder: Autoencoder
    text_encoders: list[Any]
    """None for an encoder that is not loaded."""
    vocabulary: dict[str, Any] | None = None

    def modules(self) -> dict[str, nn.Module]:
        """The modules whose weights are stored in the model folder, by file name without suffix."""
        encoders = {
            f"text_encoder_{i}": encoder
            for i, encoder in enumerate(self.text_encoders)
            if encoder is not None and encoder.config.source is None
        }
        return {"transformer": self.transformer, "autoencoder": self.autoencoder, **encoders}


def check_few_step_width(
    components: Components, width: str, *, model: str | None = None
) -> str | None:
    """A line on a few-step mode that was not trained at this width, or None.

    Args:
        model: its name for the line, as of the folder; None for the one in its config, which a
            copy or an export has from the model that it was made of.
    """
    layers = adapted_layers(components.transformer).values()
    trained = [m.adapters[FEW_STEP].widths for m in layers if FEW_STEP in m.adapters]
    name = f"the few-step mode of {model or components.config.name}"
    return check_lora_width(name, trained[0], width) if trained else None


def note_few_step_widths(
    components: Components, widths: Iterable[str], *, model: str | None = None
) -> None:
    """Print the lines of `check_few_step_width` for these widths."""
    for width in widths:
        if note := check_few_step_width(components, width, model=model):
            write_line(f"note: {note}")


def fuse_few_step(components: Components) -> None:
    """Merge the few-step LoRA into the transformer, for all widths, if the model has one.

    After that, the transformer can only sample with the steps of `config.few_step`.
    """
    if components.config.few_step is not None:
        set_lora_weights(components.transformer, {FEW_STEP: 1.0})
        fuse_lora(components.transformer)


def load_fused(
    folder: Path,
    widths: Sequence[str] = ("full",),
    *,
    few_step: bool = True,
    name: str | None = None,
) -> Components:
    """A model in float32 with the sub-network of one width, or the supernetwork for several.

    Args:
        few_step: merge the few-step LoRA, see `fuse_few_step`; otherwise `config.few_step` becomes
            None.
        name: the model's for messages; None for the one in its config.
    """
    share = parse_width(widths[0]).share if len(widths) == 1 else None
    components = load_pretrained(folder, dtype=mx.float32, share=share, few_step=few_step)
    note_few_step_widths(components, widths, model=name)
    fuse_few_step(components)
    return components


# --- writing ----------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path,
    components: Components,
    *,
    quantize: Quantization | None = None,
    dtype: mx.Dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a model folder.

    Args:
        folder: must not exist, or be empty.
        components: the model; the configs of its modules are written.
        quantize: component -> how to quantize its matrices and convolutions whose last dimension
            divides by `group_size`; an autoencoder in `EIGHT_BITS` by `even_steps`. This makes the
            file smaller. Of the loaded model, it makes only a transformer of one width smaller:
            packed weights can be neither sliced nor convolved.
        dtype: floating type to store parameters in; None keeps theirs.
        texts: more text files by name, such as {"README.md": ..., "LICENSE": ...}.

    Raises:
        UserError: the folder is not empty, or MLX does not support the quantization.
    """
    folder = expanded(folder)
    check_new(folder)
    if None in components.text_encoders:
        raise UserError("a text encoder is not loaded: load the model with all of them to save it")
    modules = components.modules()
    adapters = set(get_lora_weights(components.transformer))
    if names := sorted(adapters - {FEW_STEP}):
        raise UserError(f"fuse or remove the LoRAs first ({', '.join(names)}): a model has none")
    if (components.config.few_step is None) != (FEW_STEP not in adapters):
        raise UserError("a few-step mode takes both `config.few_step` and the few-step LoRA")
    check_quantization(quantize or {}, modules)
    config = dataclasses.replace(
        components.config,
        transformer=components.transformer.config,
        autoencoder=components.autoencoder.config,
        text_encoders=tuple(e.config for e in components.text_encoders),
        quantization={name: dict(how) for name, how in quantize.items()} if quantize else None,
    )
    # The name is a folder's, which may have bytes that are no text.
    name = config.name.encode(errors="replace").decode()
    values = {"format_version": FORMAT_VERSION} | to_dict(config) | {"name": name}
    if not is_unicode(json.dumps(values, ensure_ascii=False)):
        raise UserError("the name of a text encoder's folder is not UTF-8: rename the folder")
    files = {"config.json": json.dumps(values, indent=1)}
    if components.vocabulary is not None:
        files["vocabulary.json"] = json.dumps(components.vocabulary, indent=1, ensure_ascii=False)
    with new_folder(folder) as partial:
        for name, text in (files | dict(texts or {})).items():
            (partial / name).write_text(text, encoding="utf-8")
        for i, encoder in enumerate(components.text_encoders):
            if encoder.config.source is None:
                (partial / f"tokenizer_{i}.model").write_bytes(encoder.tokenizer.model)
        for name, module in modules.items():
            with without_lora(module):
                stored = _stored(module, quantize=(quantize or {}).get(name), dtype=dtype)
            save_tensors(partial / f"{name}.safetensors", stored, {"format": "mlx"})
        if adapters:
            path = partial / f"{FEW_STEP}.safetensors"
            transformer = components.transformer
            save_lora(path, transformer, name=FEW_STEP, base_model=config.name, dtype=dtype)


def _stored(
    module: nn.Module, *, quantize: Mapping[str, int] | None, dtype: mx.Dtype | None
) -> dict[str, mx.array]:
    """Flat parameters as they are stored in the file."""
    stored = flat_parameters(module)
    if dtype is not None:
        stored = {name: value.astype(dtype) for name, value in stored.items()}
    if quantize:
        bits, group_size = quantize["bits"], quantize["group_size"]
        evenly = isinstance(module, Autoencoder) and quantize == EIGHT_BITS
        for name in file_matrices(module, group_size):
            weight = stored[f"{name}.weight"]
            if evenly:
                packed, scales, biases = even_steps(weight)
            else:
                packed, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
            stored |= {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}
    return stored


# --- reading ----------------------------------------------------------------------------------


def load_pretrained(
    model: Model = None,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    share: float | None = None,
    few_step: bool = False,
    text_encoders: Sequence[str] | None = None,
    packed: bool = False,
) -> Components:
    """Load a model.

    Args:
        model, revision: an open `ModelFolder`, or see `hub.find_model`.
        dtype: floating type of the transformer and the text encoders. None selects float32 on the
            CPU, where other types are about fifty times slower, and the stored type on a GPU. The
            autoencoder always runs in float32, because bfloat16 causes banding on plain
            backgrounds.
        share: load only the sub-network of this width; None keeps the supernetwork.
        few_step: load the LoRA of the few-step mode too, if the model has one, as the adapter
            `FEW_STEP` of the transformer, switched off. If false, the loaded model has no few-step
            mode.
        text_encoders: names of those to load (see `text_encoders.encoder_names`), None for all.
        packed: keep a transformer of one width quantized in memory if it is stored quantized.

    Raises:
        UserError: no such model, or its weights are damaged, missing, unknown or misshapen.
    """
    folder = ModelFolder.open(model, revision=revision)
    transformer = _load_transformer(folder, share=share, few_step=few_step, packed=packed)
    materialize(transformer, on_device(dtype))
    config = dataclasses.replace(
        folder.config,
        transformer=transformer.config,
        few_step=folder.config.few_step if few_step else None,
    )
    return Components(
        config=config,
        transformer=transformer,
        autoencoder=load_autoencoder(folder),
        text_encoders=load_text_encoders(folder, dtype=dtype, names=text_encoders),
        vocabulary=load_vocabulary(folder.path),
    )


def load_text_encoders(
    model: Model = None, *, dtype: mx.Dtype | None = None, names: Sequence[str] | None = None
) -> list[Any]:
    """The text encoders of a model, None for those not among `names` (see `load_pretrained`)."""
    folder = ModelFolder.open(model)
    configs = folder.config.text_encoders
    encoders: list[Any] = [None] * len(configs)
    for i, chosen in enumerate(chosen_encoders(configs, names)):
        if chosen:
            encoders[i] = load_text_encoder(folder, i)
            materialize(encoders[i], on_device(dtype))
    return encoders


def _load_transformer(
    folder: ModelFolder, *, share: float | None, few_step: bool, packed: bool
) -> EfficientDiT:
    config = folder.config
    if share is not None:
        config.transformer.width_index(share)
    transformer = EfficientDiT(config.transformer)
    packed = packed and config.transformer.widths == (1.0,)
    load_stored(transformer, folder.parts["transformer"], packed=packed)
    if few_step and config.few_step is not None:
        path = folder.path / f"{FEW_STEP}.safetensors"
        load_lora(path, transformer, weight=0.0, name=FEW_STEP, base_model=config.name)
    if share is None or config.transformer.widths == (1.0,):
        return transformer
    return extract(transformer, share)


def load_autoencoder(model: Model = None) -> Autoencoder:
    """The autoencoder of a model, or one that `convert.from_torch` made; in float32."""
    part = None
    if model is not None and not isinstance(model, ModelFolder):
        part = read_part(Path(model), "autoencoder")
    if part is None:
        part = ModelFolder.open(model).parts["autoencoder"]
        config = part.config
    else:
        with naming(part.paths[0].with_name("config.json")):
            config = from_dict(AutoencoderConfig, part.config)
    autoencoder = make_autoencoder(config)
    load_stored(autoencoder, part)
    materialize(autoencoder, mx.float32)
    return autoencoder
