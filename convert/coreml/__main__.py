"""Export a model to Core ML, at one resolution.

    python -m convert.coreml my-model my-model-coreml --model-width small --height 512 --width 512
    python -m convert.coreml fluent fluent-coreml --quantize 4.3
    python -m convert.coreml my-model my-model-coreml --model-widths full small tiny --target ios18

The command writes Transformer.mlpackage and config.json into OUT, and report.json, which lists the
contents of the packages. For models like the built-in one it also writes Decoder.mlpackage,
TextEncoder_0.mlpackage and the tokenizer. Inputs and outputs, all for one picture:

    TextEncoder_0  tokens (1, L) int32, mask (1, L)               -> text (1, D, 1, L)
    Transformer    x_t (1, C, h, w), t (1), text (1, D, 1, L),
                   mask (1, L)                                    -> velocity (1, C, h, w)
    Decoder        latents (1, C, h, w)                           -> picture (1, 3, fh, fw)

A mask is 1 for a token of the prompt and 0 for padding. With several text encoders, join their
texts and masks along L, in the order of the encoders. The time t is the noise level in [0, 1]. The
values of a picture are about -1 to 1; clip them. Its sides are f times those of the latents: 32
times with DC-AE, mostly 8 times.

The command merges a few-step LoRA into the transformer. The export then draws only with the steps
of `few_step` in config.json. --no-few-step disables this.

--quantize stores the layers of the transformer as palettes (mlx_snapgen/quantize/palettes.py); a
model of `train.palettes` keeps its fine-tuned palettes. --model-widths writes one package with a
function for each width; the functions share their weights (convert/pytorch/tiles.py). --chunks 2
cuts the transformer between two blocks into Transformer_0 and Transformer_1. An input of the
second that takes an output of the first has the same name (convert/pytorch/chunks.py).

Of public models only MiniT2I is exported, from a folder of convert.teacher and at its own size:

    TextEncoder    tokens (1, L) int32, mask (1, L)               -> text (1, L, D), float32
    Transformer    x_t (1, 3, S, S), t (1), text (1, L, D),
                   mask (1, L)                                    -> velocity (1, 3, S, S)

A picture is 2 times the latents x_t, whose noise has unit variance. An unconditional mask is 0.
"""

import dataclasses

from convert.coreml.export import export_coreml, needed_bytes
from convert.coreml.minit2i import export_minit2i
from convert.coreml.options import (
    ExportSettings,
    check_palettes_fit,
    make_parser,
    parse_bits,
)
from convert.coreml.package import check_space
from convert.libraries import require_coremltools
from convert.options import parse
from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.hub import local_folder
from mlx_snapgen.checkpoint.model import load_fused
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import check_new
from mlx_snapgen.formats import is_teacher
from mlx_snapgen.quantize.palettes import load_palettes
from mlx_snapgen.settings import check_size, check_width


def main() -> None:
    args = parse(make_parser(__doc__))
    settings = ExportSettings(
        widths=tuple(args.widths),
        target=args.target,
        precision=args.precision,
        quantize=parse_bits(args.quantize, None),
        chunks=args.chunks,
        prompts=list(read_prompts(args.prompts_file)) if args.prompts_file else None,
    )
    settings.check()
    check_new(args.output)
    public = local_folder(args.model)
    if public is not None and is_teacher(public):
        alone = dataclasses.replace(settings, target="ios17", precision="float16")
        if alone != ExportSettings() or args.height or args.width or args.no_few_step:
            raise UserError(f"{args.model} is a public model: only --target and --precision fit it")
        export_minit2i(public, args.output, target=args.target, precision=args.precision)
        return
    with announce("loading coremltools ..."):
        require_coremltools()
    model = ModelFolder.open(args.model)
    folder, config, palettes = model.path, model.config, load_palettes(model.path)
    settings = dataclasses.replace(settings, quantize=parse_bits(args.quantize, palettes))
    settings.check()
    if settings.prompts is not None and settings.quantize is None:
        raise UserError("--prompts-file names calibration prompts: add --quantize BITS")
    if palettes and settings.quantize is not None:
        check_palettes_fit(palettes, config, widths=settings.widths, prompts=settings.prompts)
    for width in settings.widths:
        check_width(config, width)
    height, width = config.image_size
    size = (
        height if args.height is None else args.height,
        width if args.width is None else args.width,
    )
    check_size(config, *size)
    blocks = sum(config.transformer.blocks)
    if not 1 <= args.chunks <= blocks:
        raise UserError(
            f"--chunks takes 1 to {blocks}, the number of blocks of this model, not {args.chunks}"
        )
    check_space(args.output, needed_bytes(config, settings))
    with announce("loading the model ..."):
        components = load_fused(
            folder, settings.widths, few_step=not args.no_few_step, name=args.model
        )
    components.config = dataclasses.replace(components.config, image_size=size)
    report = export_coreml(components, args.output, settings, palettes=palettes)
    for name in report["not_exported"]:
        print(f"{name} is not exported: use a public Core ML export of this network")


if __name__ == "__main__":
    run_command(main)
