"""Train the elastic supernetwork by flow matching: `python -m train.flow --run-dir DIR ...`.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2): both learn the velocity (eq. 4), the sub-network also learns from the full
one (eq. 5), and the two gradients are brought to the same norm before they are added. The text
encoder learns along. Scenes are rendered and encoded on the fly, so no picture is seen twice.

`--mask-ratio` adds EDT's masking training (arXiv 2410.23788): tokens are masked on their way into
the Middle stage, which then has to guess them from the others. EDT adds the losses of a pass with
all tokens and of a masked one; here they are those of the two halves of a batch, which weighs them
alike at half the cost, each pass having scenes of its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.text_encoders import load_tokenizer
from mlx_snapgen.config import STICKERS, WIDTH_NAMES
from mlx_snapgen.errors import UserError, run_command
from train.autoencoder import load_autoencoder
from train.engine import Batch, Trainer
from train.losses import per_sample
from train.previews import previews_of
from train.supernetwork import (
    TextToLatents,
    add_arguments,
    elastic_gradients,
    make_data,
    noisy,
    sampled_widths,
    start_from,
    training_config,
)


def gradients(
    model: TextToLatents,
    batch: Batch,
    key: mx.array,
    widths: Sequence[float],
    shift: float,
    mask_ratio: float = 0.0,
    distillation_weight: float = 1.0,
):
    """Gradients of the full network and of the sub-networks of `widths`, balanced and added.

    Args:
        batch: `latents` (B, H, W, C), and for text encoder i `tokens_i` and `mask_i` (B, L).
        widths: the sampled sub-networks'; without any the full network trains alone.
        shift: timestep shift.
        mask_ratio: share of tokens masked in the second half of the batch.
        distillation_weight: of the full network's velocity beside the true one, for sub-networks.

    Returns:
        gradients like `model.trainable_parameters()`, and the losses as metrics; those of masked
        scenes have names of their own.
    """
    x0 = batch["latents"]
    x_t, t, v = noisy(x0, key, shift)
    keep = None
    if mask_ratio:
        patch = model.transformer.config.patch_size
        # A key that leaves t and the noise what they are without masking.
        key_mask = mx.random.split(key, 3)[2]
        keep = kept_tokens(len(x0), x0[0, ..., 0].size // patch**2, mask_ratio, key_mask)

    def loss(text: mx.array, mask: mx.array, width: float, full: mx.array | None):
        predicted = model.transformer(x_t, t, text, mask, width, keep=keep)
        diffusion = (predicted - v).square().mean()
        suffix = "" if full is None else f"_{width:g}"
        metrics = {f"loss{suffix}": diffusion}
        if keep is not None:
            whole, masked = mx.split(per_sample(predicted - v), [(len(x0) + 1) // 2])
            metrics = {f"loss{suffix}": whole.mean(), f"masked{suffix}": masked.mean()}
        if full is None:
            return diffusion, (predicted, metrics)
        distillation = (predicted - full).square().mean()
        metrics[f"distillation{suffix}"] = distillation
        return diffusion + distillation_weight * distillation, (predicted, metrics)

    return elastic_gradients(model, batch, widths, loss)


def kept_tokens(count: int, tokens: int, ratio: float, key: mx.array) -> mx.array:
    """Which tokens are not masked, (count, tokens): all of the first half of a batch.

    In the second half each is masked with probability `ratio`, by itself.
    """
    if count < 2:
        raise UserError("masking is for one half of a batch: give at least two scenes per batch")
    keep = mx.random.uniform(shape=(count, tokens), key=key) >= ratio
    return keep | (mx.arange(count)[:, None] < (count + 1) // 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.flow",
        description="Train the elastic stickers model. Run again with the same folder to resume.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--autoencoder", type=Path, required=True, help="folder of an autoencoder run or a model"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece .model file")
    parser.add_argument(
        "--mask-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="mask this share of the tokens before the Middle stage, in half of the scenes "
        "(EDT: .45; default 0)",
    )
    parser.add_argument(
        "--distillation-weight",
        type=float,
        default=1.0,
        metavar="W",
        help="how much more a sub-network learns from the full network's velocity than from the "
        "true one, which is noisier (default 1, as in the paper)",
    )
    args = parser.parse_args()
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio}; it must be at least 0 and below 1")
    if not args.distillation_weight >= 0:
        raise UserError(
            f"--distillation-weight is {args.distillation_weight}; it must be at least 0"
        )

    mx.random.seed(args.seed)
    config = STICKERS
    tokenizers = [load_tokenizer(args.tokenizer, c) for c in config.text_encoders]
    model = TextToLatents(config, tokenizers)
    if args.init_from:
        start_from(model, args.init_from)
    model.transformer.checkpoint_blocks(args.save_memory)
    autoencoder = load_autoencoder(args.autoencoder, args.num_nouns)
    data = make_data(args, autoencoder, tokenizers)
    widths = [WIDTH_NAMES[name] for name in args.widths]
    Trainer(
        model,
        gradients,
        data,
        training_config(args),
        args.run_dir,
        static=lambda step: (
            sampled_widths(widths, args.seed, step, args.sub_networks),
            args.time_shift,
            args.mask_ratio,
            args.distillation_weight,
        ),
        validate=previews_of(model, autoencoder, args.time_shift, args.widths),
    ).run()


if __name__ == "__main__":
    run_command(main)
