"""Weights of other programs under diffusers' names: FP8 with scales, and single files.

ComfyUI and the models' authors publish transformers as one file, with names of their own, and q, k
and v as one matrix. Here these become the weights of a folder in diffusers' format, lazily.
"""

import math
from collections.abc import Collection

import mlx.core as mx

from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.layouts import FLUX2 as FLUX2_LAYERS
from mlx_snapgen.lora.layouts import SWAPPED
from mlx_snapgen.public.keymap import KeyMap, Row, Weights, same, unchanged

PREFIX = "model.diffusion_model."
"""Of the transformer in ComfyUI's files, which may hold a text encoder and an autoencoder too."""

SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
"""Last segments of the names of a weight's scales: ComfyUI's, transformers', and ComfyUI's old."""
NOT_WEIGHTS = ("input_scale", "scale_input", "comfy_quant", "scaled_fp8")
"""Last segments of names that describe how a program multiplies in FP8; not needed here."""
BLOCK = 128
"""Side of the blocks of transformers' FP8, each with one scale."""


# --- FP8 ------------------------------------------------------------------------------------------


def scaled(weights: Weights, *, dtype: mx.Dtype, where: object) -> Weights:
    """`weights` multiplied by their scales, lazily, in the type `dtype`; others are unchanged.

    A scale is one number, one for each row, or one for each block.

    Raises:
        UserError: a scale without its weight, or of another quantization.
    """
    found = {k: v for k, v in weights.items() if k.rpartition(".")[2] not in NOT_WEIGHTS}
    for key in [key for key in found if key.rpartition(".")[2] in SCALES]:
        scale, name = found.pop(key), f"{key.rpartition('.')[0]}.weight"
        weight = found.get(name)
        if weight is None or not all(mx.issubdtype(x.dtype, mx.floating) for x in (weight, scale)):
            raise UserError(f"{where}: '{key}' scales no weight in FP8: get the original weights")
        scale = _spread(scale.astype(mx.float32), weight.shape)
        if scale is None:
            raise UserError(f"{where}: '{key}' does not fit its weight: get the original weights")
        found[name] = (weight.astype(mx.float32) * scale).astype(dtype)
    return found


def _spread(scale: mx.array, shape: tuple[int, ...]) -> mx.array | None:
    """A scale in a form that broadcasts to a weight's shape; None if it does not fit."""
    if scale.size == 1:
        return scale.reshape(())
    rows, columns = shape[0], math.prod(shape[1:])
    if scale.size == rows:
        return scale.reshape(rows, *[1] * (len(shape) - 1))
    if scale.shape != (-(-rows // BLOCK), -(-columns // BLOCK)):
        return None
    return mx.repeat(mx.repeat(scale, BLOCK, 0)[:rows], BLOCK, 1)[:, :columns]


# --- names ----------------------------------------------------------------------------------------


def _halves_swapped(value: mx.array) -> mx.array:
    """(shift, scale) -> diffusers' (scale, shift)."""
    shift, scale = mx.split(value, 2)
    return mx.concatenate([scale, shift])


FLUX2 = KeyMap(
    "FLUX.2 in its own layout",
    *(
        Row(
            f"{theirs}.weight",
            f"{ours.replace(' ', '+')}.weight",
            _halves_swapped if ours == SWAPPED else unchanged,
        )
        for theirs, ours in FLUX2_LAYERS.items()
    ),
    *(
        Row(f"{theirs}.{letter}_norm.{end}", f"{ours}{letter[0]}.weight")
        for theirs, ours in (
            ("double_blocks.#.img_attn.norm", "transformer_blocks.#.attn.norm_"),
            ("double_blocks.#.txt_attn.norm", "transformer_blocks.#.attn.norm_added_"),
            ("single_blocks.#.norm", "single_transformer_blocks.#.attn.norm_"),
        )
        for letter in ("query", "key")
        for end in ("scale", "weight")
    ),
)
"""A name with + is one matrix whose rows are the parts."""

Z_IMAGE = KeyMap(
    "Z-Image in its own layout",
    Row("x_embedder.*", "all_x_embedder.2-1.*"),
    Row("final_layer.**", "all_final_layer.2-1.**"),
    Row("**.attention.qkv.weight", "**.attention.to_q+to_k+to_v.weight"),
    Row("**.attention.out.weight", "**.attention.to_out.0.weight"),
    Row("**.attention.q_norm.weight", "**.attention.norm_q.weight"),
    Row("**.attention.k_norm.weight", "**.attention.norm_k.weight"),
    Row("norm_final.weight", None),
    same("**"),
)

OWN = {
    "double_blocks.0.img_attn.qkv.weight": FLUX2,
    "layers.0.attention.qkv.weight": Z_IMAGE,
}
"""A weight of a layout that is not diffusers' -> its table."""

KINDS = {
    "double_blocks.0.img_attn.qkv.weight": "flux2",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": "flux2",
    "layers.0.attention.qkv.weight": "z-image",
    "layers.0.attention.to_q.weight": "z-image",
    "transformer_blocks.0.img_mod.1.weight": "qwen-image",
}
"""A weight of a transformer in any layout -> the kind of model."""


def kind_of(names: Collection[str]) -> str | None:
    """The kind of model that a file of these weights is the transformer of; None for others."""
    return next((kind for k, kind in KINDS.items() if k in names or PREFIX + k in names), None)


def in_diffusers_names(weights: Weights) -> Weights:
    """The transformer in a single file under diffusers' names; other weights are unchanged.

    Raises:
        UserError: a weight that the layout does not have, or of another shape.
    """
    if kind_of(weights) is None:
        return weights
    if any(key.startswith(PREFIX) for key in weights):
        weights = {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    table = next((table for key, table in OWN.items() if key in weights), None)
    if table is None:
        return weights
    found: Weights = {}
    for name, value in table.weights(weights).items():
        joined = next((segment for segment in name.split(".") if "+" in segment), None)
        if joined is None:
            found[name] = value
            continue
        parts = joined.split("+")
        if value.ndim != 2 or len(value) % len(parts):
            raise UserError(f"'{name}' is not {len(parts)} matrices in one, but {value.shape}")
        for part, piece in zip(parts, mx.split(value, len(parts)), strict=True):
            found[name.replace(joined, part)] = piece
    return found
