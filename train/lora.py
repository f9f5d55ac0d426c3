"""Fine-tune a model on your own pictures: `python -m train.lora --data FOLDER`.

A LoRA learns the pictures of a folder (train/data/imagefolder.py) at every width, and is held to
what the model knew (train/objectives/finetune.py).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.model import Components, load_pretrained
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.lora.adapters import add_lora, train_only
from mlx_snapgen.lora.files import save_lora
from mlx_snapgen.settings import WIDTH_NAMES, WIDTHS, check_width, held_widths, parse_width
from train.data.encoded import Pictures
from train.data.imagefolder import Example, Size, bucket_sizes, digest, read_folder
from train.data.prior import draw_prior, prior_captions
from train.data.prompts import spread
from train.evaluation.drift import Validation
from train.evaluation.estimate import estimate, physical_memory
from train.loop.checkpoint import load_ema
from train.loop.config import TrainingConfig
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.finetune import gradients, step_width

TARGETS = ("*_proj", "ffn.linear*", "text.*.linear")
NAME = "default"  # of the adapter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.lora",
        description="Fine-tune a model on a folder of pictures with captions. Writes a LoRA for "
        "`python -m mlx_snapgen.generate PROMPT --lora FILE`. Run again with the same options to "
        "resume.",
        epilog="Captions: a .txt with what it shows beside each picture (cat.png, cat.txt), or "
        'one metadata.jsonl with lines {"file_name": "cat.png", "text": "a cat"}. 10 to 50 '
        "pictures of one thing do. Use the same new word for it in every caption, say what else "
        "is to be seen, and what you say can be changed later. Any size and shape will do: each "
        "picture is cropped to the nearest of a few shapes.",
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="pictures with captions")
    add("--model", help="model folder, or a Hugging Face owner/name (default: the built-in one)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="the LoRA to write; not yet there (default: FOLDER's name and .safetensors)",
    )
    add(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="checkpoints, log.jsonl, loss.png and validation pictures (default: runs/ and "
        "FOLDER's name)",
    )
    add("--steps", type=int, default=400, help="(default 400)")
    add("--batch-size", type=int, default=8, help="pictures at a time (default 8)")
    add("--accumulate", type=int, default=1, help="batches in a step (default 1)")
    add(
        "--save-memory",
        action="store_true",
        help="keep less for the backward pass, which takes longer",
    )
    add("--learning-rate", type=float, default=1e-3, help="(default 1e-3)")
    add("--rank", type=int, default=16, help="more can learn more, and forget more (default 16)")
    add("--alpha", type=float, help="the LoRA is scaled by alpha / rank (default: the rank)")
    add(
        "--targets",
        nargs="+",
        default=list(TARGETS),
        metavar="PATTERN",
        help="layers that learn (default: attention, feed-forward and text projections)",
    )
    add(
        "--widths",
        nargs="+",
        choices=WIDTH_NAMES,
        metavar="WIDTH",
        help="widths to train, of full, small and tiny (default: all that the model holds)",
    )
    add("--flip", action="store_true", help="also learn the pictures' mirror images")
    add(
        "--drop-caption",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of captions left away, as guidance needs it (default 0.1)",
    )
    add(
        "--prior-weight",
        type=float,
        default=4.0,
        help="how much the model is held to what it knew; 0 is not at all (default 4)",
    )
    add(
        "--prior-pictures",
        type=int,
        default=96,
        metavar="N",
        help="pictures of what it knew, drawn before training (default 96)",
    )
    add(
        "--prior-prompts",
        type=Path,
        metavar="FILE",
        help="what these show, one prompt in each line (default: the built-in model's vocabulary)",
    )
    add(
        "--validation-prompts",
        nargs="+",
        metavar="PROMPT",
        help="drawn at every checkpoint (default: four captions and two prompts of old)",
    )
    add("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(default 100)")
    add("--seed", type=int, default=0)
    add("--dry-run", action="store_true", help="tell what would be done, the estimate, and stop")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "accumulate", "rank", "checkpoint_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("seed", "prior_weight", "prior_pictures"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must not be negative")
    if not 0 < args.learning_rate < 1:
        raise UserError(f"--learning-rate must lie between 0 and 1, got {args.learning_rate}")
    if not 0 <= args.drop_caption < 1:
        raise UserError(f"--drop-caption must be at least 0 and below 1, got {args.drop_caption}")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: give a name ending in .safetensors")
    if args.output.exists():
        raise UserError(f"{args.output} exists already: choose another --output or delete it")


def _buckets(config: ModelConfig) -> list[Size]:
    # Two tokens per side make a compressed one, a token covers patch_size latents.
    unit = 2 * config.transformer.patch_size * config.autoencoder.downsampling
    return bucket_sizes(config.image_size, unit)


def _tell_pictures(examples: Sequence[Example], skipped: Sequence[str]) -> None:
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    sizes = Counter(example.size for example in examples)
    told = ", ".join(f"{n} of {w}x{h}" for (h, w), n in sorted(sizes.items()))
    print(f"{len(examples)} pictures ({told} pixels), {len(skipped)} left out")


def _tell_plan(
    args: argparse.Namespace,
    components: Components,
    data: Pictures,
    widths: Counter[float],
    known: Sequence[str],
    prompts: Sequence[str],
) -> None:
    """Print what will be trained, and an estimate of time and memory."""
    trained = sum(p.size for _, p in tree_flatten(components.transformer.trainable_parameters()))
    names = [width.name for width in WIDTHS if width.share in widths]
    print(
        f"training {trained:,} numbers (rank {args.rank}) at {', '.join(names)} in {args.run_dir}"
    )
    # Of what the model knows there are no pictures yet; others take as long.
    data.prior = data.buckets[0] if known else None
    shares = {width: count / widths.total() for width, count in widths.items()}
    needed = estimate(components, data(0), shares, args.accumulate)
    validations = -(-args.steps // args.checkpoint_every)
    drawn = len(known) + validations * len(prompts)
    print(f"estimate: {needed.told(args.steps, drawn)}", flush=True)
    if needed.memory > physical_memory():
        print(
            f"this machine has {physical_memory() / 1e9:.0f} GB: give --save-memory, or a smaller "
            "--batch-size with --accumulate",
            file=sys.stderr,
        )


def _settings(args: argparse.Namespace, config: ModelConfig, examples: Sequence[Example]) -> dict:
    """What a run cannot change on its way, for `claim`."""
    return {
        "pictures": digest(examples),
        "model": args.model or config.name,
        "rank": args.rank,
        "alpha": args.alpha,
        "targets": args.targets,
    }


def _training(args: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        learning_rate=args.learning_rate,
        final_learning_rate=args.learning_rate / 20,
        warmup_steps=20,
        weight_decay=0.0,
        ema_decay=0.99,
        seed=args.seed,
        checkpoint_every=args.checkpoint_every,
        log_every=10,
    )


def main() -> None:
    args = _parser().parse_args()
    name = args.data.expanduser().resolve().name or "pictures"
    args.output = (args.output or Path(f"{name}.safetensors")).expanduser()
    args.run_dir = (args.run_dir or Path("runs") / name).expanduser()
    args.alpha = args.rank if args.alpha is None else args.alpha
    _check(args)
    mx.random.seed(args.seed)
    components = load_pretrained(args.model)
    network, config = components.transformer, components.config
    held = [width.name for width in held_widths(config)]
    names = list(dict.fromkeys(args.widths or held))
    for width in names:
        check_width(config, width)
    widths = [parse_width(n).share for n in names]
    examples, skipped = read_folder(args.data, _buckets(config))
    _tell_pictures(examples, skipped)
    if not args.dry_run:
        claim(args.run_dir, _settings(args, config, examples))
    add_lora(network, args.rank, alpha=args.alpha, targets=args.targets, name=NAME)
    train_only(network, NAME)
    network.checkpoint_blocks(args.save_memory)
    data = Pictures(components, examples, args.batch_size, args.seed, args.drop_caption, args.flip)
    captions = [example.caption for example in examples]
    wanted = args.prior_pictures if args.prior_weight else 0
    known = prior_captions(components, args.prior_prompts, wanted)
    if wanted and not known:
        print("nothing holds the model to what it knew: give --prior-prompts", file=sys.stderr)
    prompts = args.validation_prompts or [*spread(captions, 4), *spread(known, 2)]

    def static(step: int) -> tuple[float, float, float]:
        width = step_width(widths, args.seed, step)
        return width, config.sampler.time_shift, args.prior_weight

    _tell_plan(args, components, data, Counter(static(k)[0] for k in range(1000)), known, prompts)
    if args.dry_run:
        return
    data.prior = draw_prior(components, known) if known else None
    trainer = Trainer(
        network,
        gradients,
        data,
        _training(args),
        args.run_dir,
        static=static,
        validate=Validation(
            components, data, prompts, max(names, key=lambda name: parse_width(name).share)
        ),
    )
    if trainer.run() and trainer.is_main:
        network.update(tree_unflatten(list(load_ema(args.run_dir).items())))
        save_lora(args.output, network, name=NAME, base_model=config.name)
        model = f" --model {args.model}" if args.model else ""
        print(f'python -m mlx_snapgen.generate "{captions[0]}"{model} --lora {args.output}')


if __name__ == "__main__":
    run_command(main)
