"""Layers by their names in the original layout of public models, which ComfyUI and kohya use too.

The networks here have the names of diffusers, where q, k and v are three layers.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """The layers here that are one layer in a file."""

    layers: tuple[str, ...]
    """Several share the input, and each has its rows of the output, in this order."""
    is_swapped: bool = False
    """Whether the halves of the rows are in the other order."""


FLUX2 = {
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.to_q to_k to_v",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.add_q_proj add_k_proj add_v_proj",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
Z_IMAGE = {
    **{
        f"{stage}.#.attention.qkv": f"{stage}.#.attention.to_q to_k to_v"
        for stage in ("layers", "noise_refiner", "context_refiner")
    },
    **{
        f"{stage}.#.attention.out": f"{stage}.#.attention.to_out.0"
        for stage in ("layers", "noise_refiner", "context_refiner")
    },
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}
"""Name in the original layout -> ours, or the names of several; # is a number."""

SWAPPED = "norm_out.linear"
"""Its shift and scale are in the other order than in FLUX.2's original layout."""


def original_names(layers: Iterable[str]) -> dict[str, Place]:
    """The names of these layers in the original layout of their network, where they differ."""
    there, found = set(layers), {}
    for table in (FLUX2, Z_IMAGE):
        for original, ours in table.items():
            first, *others = ours.split()
            pattern = re.compile(re.escape(first).replace(r"\#", r"(\d+)"))
            for layer in there:
                if (match := pattern.fullmatch(layer)) is None:
                    continue
                parent = layer.rpartition(".")[0]
                name = re.sub("#", lambda _, m=match: m[1], original)
                places = (layer, *(f"{parent}.{other}" for other in others))
                if there.issuperset(places):
                    found[name] = Place(places, layer == SWAPPED)
    return found
