"""Fine-tune a model on your own pictures: `python -m train.lora --data FOLDER`.

A LoRA is trained on the pictures of a folder (train/data/imagefolder.py) at every width; prior
preservation limits forgetting (train/objectives/finetune.py).
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.prompts_file import read_prompts
from mlx_snapgen.errors import run_command
from mlx_snapgen.lora.adapters import add_lora, train_only
from mlx_snapgen.lora.files import MOST_WORDS, save_lora
from mlx_snapgen.settings import WIDTHS, machine_memory
from train.data.encoded import EncodedFolder
from train.data.imagefolder import PictureFolder, bucket_sizes, describe, digest, read_folder
from train.data.prior import draw_prior
from train.data.prompts import spread
from train.data.stickers.source import known_prompts
from train.evaluation.drift import Validation
from train.evaluation.estimate import Estimate, estimate, num_trainable
from train.loop.run import claim
from train.loop.trainer import Trainer
from train.objectives.base import ShareStep
from train.objectives.finetune import FineTuning, step_share
from train.options.common import tuning_config, widths_of
from train.options.lora import parse

NAME = "default"  # of the adapter


def _print_estimate(args: argparse.Namespace, needed: Estimate, *, pictures: int) -> None:
    print(f"estimate: {needed.text(args.steps, pictures)}", flush=True)
    if needed.memory > machine_memory():
        print(
            f"this machine has {machine_memory() / 1e9:.0f} GB: give --save-memory, or a smaller "
            "--batch-size with --accumulate",
            file=sys.stderr,
        )


def main() -> int:
    args = parse()
    given = list(read_prompts(args.prior_prompts)) if args.prior_prompts else None
    mx.random.seed(args.seed)
    with announce(f"loading {args.model} ..."):
        components = load_pretrained(args.model)
    network, config = components.transformer, components.config
    shares = [width.share for width in widths_of(args, config)]
    examples, skipped = read_folder(args.data, bucket_sizes(config.image_size, config.size_unit))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    print(f"{describe(examples)}, {len(skipped)} skipped")
    settings = {
        "pictures": digest(examples),
        "model": args.model,
        "rank": args.rank,
        "alpha": args.alpha,
        "targets": args.targets,
    }
    if not args.dry_run:
        claim(args.run_dir, settings)
    add_lora(network, args.rank, alpha=args.alpha, targets=args.targets, name=NAME)
    train_only(network, NAME)
    network.checkpoint_blocks(args.save_memory)
    folder = PictureFolder(examples, seed=args.seed, flip=args.flip)
    with announce("encoding the pictures ..."):
        data = EncodedFolder(
            components, folder, batch_size=args.batch_size, drop_caption=args.drop_caption
        )
    wanted = args.prior_pictures if args.prior_weight else 0
    prior_prompts = known_prompts(components, wanted) if given is None else given[:wanted]
    if wanted and not prior_prompts:
        print("no prior preservation without prompts: give --prior-prompts", file=sys.stderr)
    captions = [example.caption for example in examples]
    prompts = args.validation_prompts or [*spread(captions, 4), *spread(prior_prompts, 2)]

    def arguments(step: int) -> ShareStep:
        return ShareStep(step_share(shares, seed=args.seed, step=step))

    trained = [width for width in WIDTHS if width.share in shares]
    print(
        f"training {num_trainable(network):,} parameters (rank {args.rank}) at "
        f"{', '.join(width.name for width in trained)} in {args.run_dir}",
        flush=True,
    )
    # Prior samples do not exist yet; other pictures take the same time.
    data.prior = data.buckets[0] if prior_prompts else None
    steps = Counter(arguments(k).share for k in range(1000))
    often = {share: count / steps.total() for share, count in steps.items()}
    with announce("measuring a step ..."):
        needed = estimate(components, data(0), shares=often, accumulate=args.accumulate)
    validations = -(-args.steps // args.checkpoint_every)
    _print_estimate(args, needed, pictures=len(prior_prompts) + validations * len(prompts))
    if args.dry_run:
        return 0
    data.prior = draw_prior(components, prior_prompts) if prior_prompts else None
    trainer = Trainer(
        network,
        FineTuning(config.time_shift(*config.image_size), args.prior_weight),
        batches=data,
        config=tuning_config(args, accumulate=args.accumulate),
        run_dir=args.run_dir,
        arguments=arguments,
        validate=Validation(components, data, prompts, width=trained[0].name),
    )
    if trainer.run() and trainer.is_main:
        with trainer.averaged():
            save_lora(
                args.output,
                network,
                name=NAME,
                base_model=config.name,
                words=caption_words(captions),
            )
        model = "" if args.model == "stickers" else f" --model {args.model}"
        print(f"{args.output} is complete. To draw with it:")
        print(f'python -m mlx_snapgen.generate "{captions[0]}"{model} --lora {args.output}')
    return trainer.exit_code


COMMON = {"the", "and", "with", "from", "for", "its", "this", "that", "next", "above", "below"}


def caption_words(captions: Sequence[str]) -> list[str]:
    """The words of captions that may name things: of three letters or more, the common left out."""
    words = Counter(word for text in captions for word in re.findall(r"[^\W\d_]{3,}", text.lower()))
    return sorted(word for word, _ in words.most_common(MOST_WORDS) if word not in COMMON)


if __name__ == "__main__":
    run_command(main)
