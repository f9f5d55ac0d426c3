"""Store a model's weights in palettes, and tune biases and norms to them.

    python -m train.palettes --model my-model --quantize 4.3 --output my-model-4.3
    python -m convert.coreml my-model-4.3 my-model-coreml

The command gives each layer of the transformer a palette of 16 or 256 numbers, the same as
`convert.coreml --quantize`. Training changes only biases and norms: with these, the network with
palettes learns the velocity of the network without palettes, on drawings of the model itself
(SnapGen++ section 6). The output is an ordinary model folder; its palettes.json lists the bits of
each layer. In MLX the model draws with the same weights as on a phone. `convert.coreml` exports it
with these palettes, and stops if a weight is not in its palette.

The command merges a few-step LoRA first. With one width, the output is a model of that width only;
several widths share the palettes and are trained in turn.
"""

import dataclasses
import functools
import shlex

import mlx.core as mx

from mlx_snapgen.checkpoint.config import ModelFolder
from mlx_snapgen.checkpoint.model import warn_untrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.files import whole_file
from mlx_snapgen.quantize.palettes import with_palettes
from mlx_snapgen.quantize.sensitivity import choose_palettes
from mlx_snapgen.settings import check_width, parse_width
from train.data.prompts import spread
from train.data.stickers.source import known_prompts
from train.data.stickers.vocabulary import check_drawable, known_nouns
from train.data.trajectories import Trajectories
from train.evaluation.estimate import num_trainable
from train.evaluation.palettes import HELD_OUT_SEED, Validation, compare, in_float16
from train.evaluation.previews import Previews
from train.evaluation.stickers.score import score_cell
from train.loop.checkpoint import writing
from train.loop.palettes import load_alone, save
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.base import ShareStep
from train.objectives.finetune import step_share
from train.objectives.palettes import PaletteTuning, train_biases_and_norms
from train.options.common import tuning_config
from train.options.palettes import HELD_OUT, parse


def main() -> int:
    args = parse(__doc__)
    mx.random.seed(args.seed)
    model = ModelFolder.open(args.model)
    folder, config = model.path, model.config
    for name in args.model_widths:
        check_width(config, name)
    given = list(read_prompts(args.prompts_file)) if args.prompts_file else None
    too_few = f"--prompts-file: more than {HELD_OUT} prompts are needed, a line for each"
    if given and len(given) <= HELD_OUT:
        raise UserError(too_few)
    with announce(f"loading {args.model} ..."):
        components = load_alone(folder, args.model_widths, name=args.model)
    warn_untrained(components.transformer, args.model, result="palettes of it are of no use")
    if args.score:
        # Fail early, before sampling.
        known_nouns(components, "leave out --score")
        check_drawable(components, args.score_with, "--score-with FOLDER")
    if args.score_with:
        from train.data.stickers.render import find_pictures  # reads the font

        args.score_with = find_pictures(args.score_with)
    # In a model of one width, that width has share 1.
    alone = len(args.model_widths) == 1
    widths = {name: 1.0 if alone else parse_width(name).share for name in args.model_widths}
    captions = given[: args.pictures] if given else known_prompts(components, args.pictures)
    if len(captions) <= HELD_OUT:
        raise UserError(too_few)
    learned, held = captions[HELD_OUT:], captions[:HELD_OUT]

    with announce("measuring the sensitivity of each layer ..."):
        palettes = choose_palettes(components, args.quantize, widths=widths)
    claim(args.run_dir, {"model": args.model, "captions": captions} | palettes.to_dict())
    network = with_palettes(components.transformer, palettes.bits)
    before = with_palettes(network, {})
    shares = list(widths.values())
    train_biases_and_norms(network, shares)

    def share_of(step: int) -> float:
        return step_share(shares, seed=args.seed, step=step)

    processes = mx.distributed.init().size()
    data = Trajectories(
        components,
        learned,
        shares,
        batch_size=args.batch_size,
        seed=args.seed,
        share_of=lambda number: share_of(number // processes),
    )
    held_out = Trajectories(components, held, shares, first_seed=HELD_OUT_SEED)
    drawn = dataclasses.replace(components, transformer=network)
    previews = Previews(drawn, spread(held, 4), widths=["full"] if alone else args.model_widths)
    trainer = Trainer(
        network,
        PaletteTuning(),
        batches=data,
        config=tuning_config(args),
        run_dir=args.run_dir,
        arguments=lambda step: ShareStep(share_of(step)),
        validate=Validation(network, held_out, widths=widths, previews=previews),
    )
    print(
        f"training {num_trainable(network):,} parameters at {', '.join(widths)} in {args.run_dir}",
        flush=True,
    )
    if not (trainer.run() and trainer.is_main):
        return trainer.exit_code
    with trainer.averaged():
        networks = {
            "fp16": in_float16(components.transformer),
            f"{args.quantize:g} bits, palettes alone": before,
            f"{args.quantize:g} bits, fine-tuned": network,
        }
        score = (
            functools.partial(score_cell, per_category=args.score, pictures=args.score_with)
            if args.score
            else None
        )
        table = compare(components, networks, held_out, captions=held, widths=widths, score=score)
        with writing(args.run_dir), whole_file(args.run_dir / "table.md") as partial:
            partial.write_text(table)
        # Last: with it, the command counts as done.
        save(args.output, components, network, palettes=palettes, model=folder)
    print(f"{args.output} is complete. To export it:")
    print("python -m convert.coreml " + shlex.join([f"{args.output}", f"{args.output}-coreml"]))
    print(table, end="")
    return 0


if __name__ == "__main__":
    run_command(main)
