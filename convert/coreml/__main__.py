"""Export a model to Core ML, at one resolution.

    python -m convert.coreml my-model my-model-coreml --width small --resolution 512
    python -m convert.coreml my-model my-model-coreml --quantize 4.3
    python -m convert.coreml my-model my-model-coreml --widths full small tiny --target ios18

The folder gets Transformer.mlpackage, of the default model's kinds also Decoder.mlpackage and
TextEncoder_0.mlpackage with its tokenizer, the config.json of this width and resolution, and
report.json, which tells what is in the packages. Inputs and outputs, all for one picture:

    TextEncoder_0  tokens (1, L) int32, mask (1, L)               -> text (1, D, 1, L)
    Transformer    x_t (1, C, h, w), t (1), text (1, D, 1, L),
                   mask (1, L)                                    -> velocity (1, C, h, w)
    Decoder        latents (1, C, h, w)                           -> picture (1, 3, 8h, 8w)

A mask is 1 where a token counts. The texts and masks of several text encoders are joined along L in
their order. The time t is the noise level in [0, 1], and a picture is in [-1, 1], unclipped.

The few-step LoRA of a model that has one is fused into the transformer, which then draws in the
steps of `few_step` in config.json and no other way; --no-few-step leaves it out.

--quantize gives the transformer's layers palettes (mlx_snapgen/quantize/palettes.py); a model that
`train.palettes` wrote keeps the ones it was fine-tuned with. --widths makes one package with a
function for each width, which share their weights (`torch_tiles`), and --chunks 2 cuts the
transformer between two blocks into Transformer_0 and Transformer_1, whose further inputs and
outputs have the same names (`torch_chunks`).
"""

import dataclasses

from convert.coreml.export import export_coreml, load_for_export, needed_bytes
from convert.coreml.options import (
    check_options,
    check_palettes_fit,
    make_parser,
    parse_bits,
    parse_resolution,
    read_prompts,
)
from convert.coreml.package import check_space, coremltools
from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.quantize.palettes import load_palettes
from mlx_snapgen.settings import check_size, check_width


def main() -> None:
    args = make_parser(__doc__).parse_args()
    widths = args.widths or [args.width]
    prompts = read_prompts(args.prompts) if args.prompts else None
    coremltools()  # fails before anything is loaded
    check_new(args.output)
    folder = find_model(args.model)
    config, palettes = load_config(folder), load_palettes(folder)
    quantize = parse_bits(args.quantize, palettes)
    check_options(widths, args.target, args.precision, quantize)
    if palettes and quantize is not None:
        check_palettes_fit(palettes, config, widths, prompts)
    for width in widths:
        check_width(config, width)
    size = parse_resolution(args.resolution) if args.resolution else config.image_size
    check_size(config, *size)
    blocks = sum(config.transformer.blocks)
    if not 1 <= args.chunks <= blocks:
        raise UserError(f"--chunks takes 1 to {blocks}, the blocks of this model: {args.chunks}")
    check_space(args.output, needed_bytes(config, widths, args.precision))
    components = load_for_export(folder, widths, not args.no_few_step)
    components.config = dataclasses.replace(components.config, image_size=size)
    report = export_coreml(
        components,
        args.output,
        widths,
        args.target,
        args.precision,
        quantize,
        args.chunks,
        prompts,
        palettes,
    )
    for name in report["not_exported"]:
        print(f"{name} is not exported: take a public export of it")


if __name__ == "__main__":
    run_command(main)
