"""Palettes for a model's weights, and biases and norms tuned to them.

    python -m train.palettes --model my-model --bits 4.3 --output my-model-4.3
    python -m convert.coreml my-model-4.3 my-model-coreml

The weights of the transformer's layers get palettes of 16 or 256 numbers, chosen as
`convert.coreml --quantize` chooses them, and stay so. Then the biases and norms alone learn to
predict, all along the model's own way from noise to pictures, the velocity that the network without
palettes predicts there (SnapGen++ section 6). The output is an ordinary model folder, whose
palettes.json tells the bits of each layer: it draws in MLX what the phone will, and
`convert.coreml` exports it with these very palettes, or refuses weights that are not of them.

The few-step LoRA of a model that has one is fused first. One width makes a model of that width
alone; several share their palettes and are trained in turn.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.config import load_config
from mlx_snapgen.checkpoint.hub import find_model
from mlx_snapgen.checkpoint.model import Components, fuse_few_step, load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.quantize.palettes import Palettes, check_palettes, palettes_file, with_palettes
from mlx_snapgen.quantize.sensitivity import choose_palettes
from mlx_snapgen.settings import WIDTH_NAMES, check_width, parse_width
from train.data.prior import prior_captions
from train.data.prompts import spread
from train.data.stickers.vocabulary import known_nouns
from train.data.trajectories import Trajectories
from train.evaluation.palettes import HELD_OUT_SEED, Validation, compare, in_float16
from train.evaluation.previews import Previews
from train.loop.checkpoint import load_ema
from train.loop.config import TrainingConfig
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.finetune import step_width
from train.objectives.palettes import gradients, train_biases_and_norms

HELD_OUT = 16  # prompts that nothing is learned from


# --- what is learned ----------------------------------------------------------------------------


# --- how good it is -----------------------------------------------------------------------------


# --- the command --------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.palettes",
        description=__doc__,
        epilog="Run again with the same options to resume.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="model folder, or a Hugging Face owner/name (default: the built-in one)")
    add(
        "--output", type=Path, required=True, metavar="FOLDER", help="model to write; not yet there"
    )
    add(
        "--bits",
        type=float,
        default=4.3,
        help="4 to 8, of the transformer's weights on average (default 4.3)",
    )
    add(
        "--widths",
        nargs="+",
        choices=WIDTH_NAMES,
        default=["full"],
        metavar="WIDTH",
        help="of full, small and tiny (default full)",
    )
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="what the model draws to learn from, one prompt in each line (default: scenes of the "
        "built-in model's vocabulary)",
    )
    add("--pictures", type=int, default=128, metavar="N", help="drawn for it (default 128)")
    add(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="checkpoints, log.jsonl, loss.png, pictures and table.md (default: runs/ and the "
        "output's name)",
    )
    add("--steps", type=int, default=1000, help="(default 1000)")
    add("--batch-size", type=int, default=16, help="(default 16)")
    add("--learning-rate", type=float, default=1e-3, help="(default 1e-3)")
    add("--checkpoint-every", type=int, default=250, metavar="STEPS", help="(default 250)")
    add("--seed", type=int, default=0)
    add(
        "--score",
        type=int,
        default=0,
        metavar="N",
        help="put the GenEval-style score into the table too, over N prompts of each category",
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if not 4 <= args.bits <= 8:
        raise UserError(f"--bits takes 4 to 8 on average, not {args.bits:g}")
    if not 0 < args.learning_rate < 1:
        raise UserError(f"--learning-rate must lie between 0 and 1, got {args.learning_rate}")
    if args.pictures <= HELD_OUT:
        raise UserError(f"--pictures must be above {HELD_OUT}, of which nothing is learned")
    if len(set(args.widths)) < len(args.widths):
        raise UserError(f"a width is named twice: {' '.join(args.widths)}")
    if args.output.exists():
        raise UserError(f"{args.output} exists already: choose another --output or delete it")


def _training(args: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        final_learning_rate=args.learning_rate / 20,
        warmup_steps=20,
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        log_every=10,
    )


def load_alone(folder: Path, widths: Sequence[str]) -> Components:
    """A model in float32 whose sampler is its few-step mode, if it has one, and that LoRA fused.

    Args:
        widths: one takes that sub-network alone.
    """
    width = parse_width(widths[0]).share if len(widths) == 1 else None
    components = load_pretrained(folder, dtype=mx.float32, share=width, few_step=True)
    fuse_few_step(components)
    config = dataclasses.replace(
        components.config, sampler=components.config.sampler_for(), few_step=None
    )
    return dataclasses.replace(components, config=config)


def save(
    output: Path, components: Components, network: EfficientDiT, palettes: Palettes, model: Path
) -> None:
    """Write the model with `network` for its transformer, and the licence that came with it."""
    check_palettes(network, palettes)
    texts = palettes_file(palettes)
    if (licence := model / "LICENSE").is_file():
        texts["LICENSE"] = licence.read_text(encoding="utf-8")
    save_pretrained(output, dataclasses.replace(components, transformer=network), texts=texts)


def main() -> None:
    args = _parser().parse_args()
    args.output = args.output.expanduser()
    args.run_dir = (args.run_dir or Path("runs") / args.output.name).expanduser()
    _check(args)
    mx.random.seed(args.seed)
    folder = find_model(args.model)
    config = load_config(folder)
    for name in args.widths:
        check_width(config, name)
    components = load_alone(folder, args.widths)
    if args.score:
        known_nouns(components)  # fails before anything is drawn
    # A model of one width is that width.
    alone = len(args.widths) == 1
    widths = {name: 1.0 if alone else parse_width(name).share for name in args.widths}
    captions = prior_captions(components, args.prompts, args.pictures)
    if len(captions) <= HELD_OUT:
        raise UserError(f"--prompts: more than {HELD_OUT} prompts are needed, a line for each")
    learned, held = captions[HELD_OUT:], captions[:HELD_OUT]

    palettes = choose_palettes(components, args.bits, widths=widths)
    claim(
        args.run_dir,
        {"model": args.model or config.name, "captions": captions} | palettes.to_dict(),
    )
    network = with_palettes(components.transformer, palettes.bits)
    before = with_palettes(network, {})
    train_biases_and_norms(network, widths.values())
    trained = sum(p.size for _, p in tree_flatten(network.trainable_parameters()))
    print(f"training {trained:,} numbers at {', '.join(widths)} in {args.run_dir}", flush=True)

    def width_of(step: int) -> float:
        return step_width(list(widths.values()), args.seed, step)

    processes = mx.distributed.init().size()
    shares = list(widths.values())
    data = Trajectories(
        components,
        learned,
        shares,
        args.batch_size,
        args.seed,
        width_of=lambda number: width_of(number // processes),
    )
    held_out = Trajectories(components, held, shares, first_seed=HELD_OUT_SEED)
    drawn = dataclasses.replace(components, transformer=network)
    previews = Previews(drawn, ["full"] if alone else args.widths, spread(held, 4))
    trainer = Trainer(
        network,
        gradients,
        data,
        _training(args),
        args.run_dir,
        static=lambda step: (width_of(step),),
        validate=Validation(held_out, widths, previews),
    )
    if not (trainer.run() and trainer.is_main):
        return
    network.update(tree_unflatten(list(load_ema(args.run_dir).items())))
    save(args.output, components, network, palettes, folder)
    networks = {
        "fp16": in_float16(components.transformer),
        f"{args.bits:g} bits, palettes alone": before,
        f"{args.bits:g} bits, fine-tuned": network,
    }
    table = compare(components, networks, held_out, held, widths, args.score)
    (args.run_dir / "table.md").write_text(table)
    print(table, end="")
    print(f"python -m convert.coreml {args.output} {args.output}-coreml")


if __name__ == "__main__":
    run_command(main)
