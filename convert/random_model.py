"""Write a model of real size with random weights, to measure speed and memory with.

    python -m convert.random_model small random-small
    python -m convert.random_model full random-full --quantize 4
    python -m mlx_snapgen.generate "a red apple" --model random-small --steps 2
    python -m convert.random_model flux2-klein random-klein --quantize 4
    python -m convert.sample_teacher random-klein "a red apple" --output a.png --steps 1

A model of the paper's sizes has the transformer of a preset, Qwen-Image's autoencoder (DC-AE if the
preset is named -f32), TinyCLIP's text tower at full size, and a Gemma 3 with two small layers and
the state width of the 4B model.
flux2-klein, z-image and minit2i are public models with all parts at full size; --quantize also
applies to their text encoder. Pictures are noise. The command writes one weight after another, so
memory does not grow with the model.
"""

import dataclasses
import json
import math
from collections.abc import Collection
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from convert.options import add_output, add_quantize, parse
from convert.parity.originals import write_byte_tokenizer, write_spiece
from mlx_snapgen.checkpoint.module import FORMAT_VERSION, matrices
from mlx_snapgen.checkpoint.t5 import t5_config
from mlx_snapgen.cli.notices import announce, peak_process_bytes
from mlx_snapgen.cli.options import Parser, integer
from mlx_snapgen.config import ModelConfig, TextEncoderConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new, new_folder
from mlx_snapgen.formats import CONFIG as TEACHER_CONFIG
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder
from mlx_snapgen.presets import (
    FLUX2_AUTOENCODER,
    PIXELS,
    TINYCLIP_19M,
    TRANSFORMERS,
    preset_autoencoder,
    transformer_preset,
)
from mlx_snapgen.public.keys.gemma import gemma_shapes
from mlx_snapgen.public.stream import Entry, lazy, write_new
from mlx_snapgen.public_config import (
    Flux2TransformerConfig,
    MiniT2ITransformerConfig,
    ZImageTransformerConfig,
)
from mlx_snapgen.teachers.config import KLEIN, MINIT2I, TURBO, TeacherConfig
from mlx_snapgen.teachers.folder import FORMAT_VERSION as TEACHER_FORMAT_VERSION
from mlx_snapgen.teachers.folder import NETWORKS, quantizable

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 260,
    "hidden_size": 2560,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-6,
}
"""Gemma-3-4b-it cut to two layers, a narrow MLP and a vocabulary of bytes."""

FLAN_T5_LARGE = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 24,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
}

QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}

FLUX_AUTOENCODER = dataclasses.replace(FLUX2_AUTOENCODER, kind="kl", latent_channels=16)

TEACHERS = {
    "flux2-klein": TeacherConfig(
        "flux2", Flux2TransformerConfig(), FLUX2_AUTOENCODER, schedule=KLEIN, few_step=KLEIN
    ),
    "z-image": TeacherConfig(
        "z-image", ZImageTransformerConfig(), FLUX_AUTOENCODER, schedule=TURBO, few_step=TURBO
    ),
    "minit2i": TeacherConfig("minit2i", MiniT2ITransformerConfig(), PIXELS, schedule=MINIT2I),
}
"""Public models: two that are distilled, with a Qwen3-4B, and MiniT2I-B/16 with a FLAN-T5-large."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def write_random_model(
    output: Path,
    preset: str,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    seed: int = 0,
) -> None:
    """Write a model folder.

    Args:
        output: must not exist, or be an empty folder.
        preset: name in `presets.TRANSFORMERS` of a transformer with the paper's two text encoders.
        dtype: of the transformer and the text encoders; the autoencoder's is float32.
        bits: of the transformer's matrices, quantized in groups of 32; None does not quantize.

    Raises:
        UserError: no such preset, or an output that is not empty.
    """
    transformer = transformer_preset(preset)
    if transformer.text_dims != (GEMMA["hidden_size"], TINYCLIP_19M.hidden_size):
        raise UserError(f"the preset '{preset}' has other text encoders than the paper's")
    gemma = TextEncoderConfig(
        kind="gemma",
        vocab_size=GEMMA["vocab_size"],
        hidden_size=GEMMA["hidden_size"],
        num_layers=GEMMA["num_hidden_layers"],
        num_heads=GEMMA["num_attention_heads"],
        max_length=300,
        source="gemma",
    )
    how = None if bits is None else {"bits": bits, "group_size": 32}
    config = ModelConfig(
        name=f"random-{preset}",
        transformer=transformer,
        autoencoder=preset_autoencoder(preset),
        text_encoders=(gemma, TINYCLIP_19M),
        quantization=how and {"transformer": how},
    )
    mx.random.seed(seed)
    with new_folder(output) as folder:
        values = {"format_version": FORMAT_VERSION} | to_dict(config)
        (folder / "config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        _write(folder / "transformer.safetensors", EfficientDiT(transformer), dtype=dtype, how=how)
        autoencoder = make_autoencoder(config.autoencoder)
        _write(folder / "autoencoder.safetensors", autoencoder, dtype=mx.float32)
        clip = ClipTextEncoder(TINYCLIP_19M)
        _write(folder / "text_encoder_1.safetensors", clip, dtype=dtype)
        # Without merges, each byte is a token.
        (folder / "tokenizer_1.model").write_bytes(ClipTokenizer(b"", 77).model)
        _write_gemma(folder / "gemma", dtype)


def write_random_teacher(
    output: Path,
    name: str,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    seed: int = 0,
) -> None:
    """Write a teacher's folder.

    Args:
        output: must not exist, or be an empty folder.
        name: key of `TEACHERS`.
        dtype: of the transformer and the text encoder; the autoencoder's is float32.
        bits: of the matrices in the transformer's blocks and in the text encoder, quantized in
            groups of 64; None does not quantize.

    Raises:
        UserError: mlx-lm is needed but not installed, or an output that is not empty.
    """
    how = None if bits is None else {"bits": bits, "group_size": 64}
    config = dataclasses.replace(TEACHERS[name], quantization=how)
    network = NETWORKS[config.kind](config.transformer)
    layers = {k.removesuffix(".weight") for k in quantizable(network, 64)} if how else set()
    mx.random.seed(seed)
    with new_folder(output) as folder:
        values = {"format_version": TEACHER_FORMAT_VERSION} | to_dict(config)
        (folder / TEACHER_CONFIG).write_text(json.dumps(values, indent=1), encoding="utf-8")
        path = folder / "transformer-00001.safetensors"
        _write(path, network, dtype=dtype, how=how, layers=layers)
        draws_pixels = config.kind == "minit2i"
        if not draws_pixels:
            autoencoder = make_autoencoder(config.autoencoder)
            _write(folder / "autoencoder.safetensors", autoencoder, dtype=mx.float32)
        text = folder / config.text_encoder
        text.mkdir()
        values = FLAN_T5_LARGE if draws_pixels else QWEN3_4B
        tower = _t5(text) if draws_pixels else _qwen3(text)
        values = values | ({} if how is None else {"quantization": how})
        (text / "config.json").write_text(json.dumps(values, indent=1))
        _write(text / "model.safetensors", tower, dtype=dtype, how=how)


def _qwen3(folder: Path) -> nn.Module:
    """Qwen3-4B; `folder` gets its tokenizer."""
    try:
        from mlx_lm.models.qwen3 import Model, ModelArgs
    except ImportError:
        raise UserError('a teacher needs mlx-lm: pip install "mlx_snapgen[public]"') from None
    write_byte_tokenizer(folder)
    return Model(ModelArgs.from_dict(QWEN3_4B))


def _t5(folder: Path) -> nn.Module:
    """The encoder of FLAN-T5-large; `folder` gets its tokenizer."""
    write_spiece(folder / "spiece.model")
    return T5Encoder(t5_config(FLAN_T5_LARGE, folder))


def _write(
    path: Path,
    module: nn.Module,
    *,
    dtype: mx.Dtype,
    how: dict[str, int] | None = None,
    layers: Collection[str] | None = None,
) -> None:
    """Write random weights for all parameters of a module; its own are lazy and not used.

    Args:
        layers: those to quantize; None for all matrices.
    """
    quantized = set(matrices(module, how["group_size"])) if how else set()
    if layers is not None:
        quantized &= set(layers)
    entries = []
    for name, start in dict(tree_flatten(module.parameters())).items():
        layer = name.removesuffix(".weight")
        if how is not None and layer in quantized:
            entries.append(_random_packed(layer, start.shape, dtype=dtype, **how))
        else:
            value = _random(start.shape) + (start if start.ndim < 2 else 0)
            entries.append(lazy(name, value.astype(dtype)))
    write_new(path, entries)


def _random(shape: tuple[int, ...]) -> mx.array:
    """Uniform numbers; a matrix of them preserves the variance of its input."""
    bound = (3 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.02
    return mx.random.uniform(-bound, bound, shape)


def _random_packed(
    layer: str, shape: tuple[int, ...], *, dtype: mx.Dtype, bits: int, group_size: int
) -> Entry:
    """A quantized matrix: random bits, scaled from -bound to bound like `_random`."""
    bound = (3 / shape[1]) ** 0.5
    groups = (shape[0], shape[1] // group_size)
    # randint computes in float32, which holds integers up to 2^16 exactly, not up to 2^32.
    halves = mx.random.randint(0, 2**16, (shape[0], shape[1] * bits // 16), mx.uint16)
    values = {
        f"{layer}.weight": halves.view(mx.uint32),
        f"{layer}.scales": mx.full(groups, 2 * bound / (2**bits - 1), dtype),
        f"{layer}.biases": mx.full(groups, -bound, dtype),
    }
    shapes = {name: (value.dtype, value.shape) for name, value in values.items()}
    return Entry(shapes, lambda: ({name: values.pop(name) for name in shapes}, None))


def _write_gemma(folder: Path, dtype: mx.Dtype) -> None:
    """Write a folder in mlx-lm's format."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GEMMA, indent=1))
    shapes = gemma_shapes(GEMMA).items()
    entries = [lazy(name, _random(shape).astype(dtype)) for name, shape in shapes]
    write_new(folder / "model.safetensors", entries)
    write_byte_tokenizer(folder)


def main() -> None:
    presets = [n for n, c in TRANSFORMERS.items() if c.text_dims == (2560, 512)]
    parser = Parser(
        prog="python -m convert.random_model", description=__doc__, renamed={"--bits": "--quantize"}
    )
    parser.add_argument(
        "preset",
        metavar="PRESET",
        help=f"size of the transformer: {', '.join(presets)}; or a public model: "
        + ", ".join(TEACHERS),
    )
    add_output(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="type of the numbers of transformer and text encoders (default: bfloat16)",
    )
    add_quantize(parser, "the transformer")
    parser.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="seed of the weights (default: 0)"
    )
    args = parse(parser)
    check_new(args.output)
    dtype = DTYPES[args.dtype]
    with announce("writing random weights ..."):
        bits, seed = args.quantize or None, args.seed
        write = write_random_teacher if args.preset in TEACHERS else write_random_model
        write(args.output, args.preset, dtype=dtype, bits=bits, seed=seed)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB, peak memory {peak_process_bytes() / 2**20:.0f} MiB")


if __name__ == "__main__":
    run_command(main)
