"""What flow matching and distillation share: the elastic student, its data and its gradients.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2), and their gradients are brought to the same norm before they are added.
What each of them learns is the trainer's own loss. The text encoders learn along.

`--sub-networks 2` runs two sub-networks in a step. They cost little beside the full one, and with
the paper's single one each of them learns in only half of the steps.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import WIDTH_NAMES, ModelConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.networks.text_encoders.sentencepiece import Tokenizer
from mlx_snapgen.sampling import shift_time
from train import stickers
from train.autoencoder import to_float
from train.engine import Batch, TrainingConfig, load_ema
from train.losses import add_noise
from train.scenes import CATEGORIES


class TextToLatents(nn.Module):
    """Transformer and text encoders, the parts that train together."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer]):
        super().__init__()
        self.config = config
        self.transformer = EfficientDiT(config.transformer)
        self.text_encoders = [
            new_text_encoder(c, t) for c, t in zip(config.text_encoders, tokenizers, strict=True)
        ]


def load_trained(folder: Path) -> dict:
    """Weights for `TextToLatents` from a model folder, or the averaged ones of a run."""
    if (folder / "config.json").is_file():
        model = load_pretrained(folder)
        encoders = [e.parameters() for e in model.text_encoders]
        return {"transformer": model.transformer.parameters(), "text_encoders": encoders}
    trained = tree_unflatten(list(load_ema(folder).items()))
    # A run may have trained more than a model keeps, such as the projectors of distillation.
    return {name: trained[name] for name in ("transformer", "text_encoders") if name in trained}


def start_from(model: TextToLatents, folder: Path) -> None:
    """Put the weights of a model folder or a run into `model`; a `UserError` if they do not fit."""
    weights = load_trained(folder)
    found = {k: p.shape for k, p in tree_flatten(weights)}
    wanted = {
        f"{part}.{k}": p.shape
        for part in ("transformer", "text_encoders")
        for k, p in tree_flatten(model.parameters()[part])
    }
    if found != wanted:
        key = next(k for k in {**wanted, **found} if wanted.get(k) != found.get(k))
        raise UserError(
            f"{folder} holds another model: '{key}' is {found.get(key, 'missing')} there, "
            f"{wanted.get(key, 'missing')} here"
        )
    model.update(weights)


# --- data ---------------------------------------------------------------------------------------


class Data:
    """Batches of encoded scenes with tokenized captions.

    Args:
        drop_caption: share of captions replaced by the empty prompt, for guidance; with several
            encoders each drops on its own.
        categories: kinds of scenes to draw, of `train.scenes.CATEGORIES`; None for all.
        noises_per_scene: how many micro-batches of a step show the same scenes, for the trainer to
            put different noise on them; drawing and encoding them is a fifth of a step's time.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        tokenizers: Sequence[Tokenizer],
        batch_size: int,
        num_nouns: int | None,
        seed: int,
        drop_caption: float,
        categories: Sequence[str] | None = None,
        noises_per_scene: int = 1,
    ):
        self.tokenizers, self.batch_size, self.num_nouns = tokenizers, batch_size, num_nouns
        self.categories, self.noises_per_scene = categories, noises_per_scene
        self.scenes = functools.lru_cache(maxsize=1)(self._scenes)
        self.seed, self.drop_caption = seed, drop_caption
        self.encode = mx.compile(autoencoder.encode)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; the same whenever it is asked for."""
        return self.with_prompts(number)[0]

    def with_prompts(self, number: int) -> tuple[Batch, list[str]]:
        """Batch `number` and what it was told: captions, "" where no encoder was given any."""
        # The engine numbers batches by step, then micro-batch, then process.
        processes = mx.distributed.init().size()
        step = number // (self.noises_per_scene * processes)
        latents, captions = self.scenes(step * processes + number % processes)
        batch = {"latents": latents}
        rng = np.random.default_rng((self.seed, number, 2))
        told = [""] * self.batch_size
        for i, tokenizer in enumerate(self.tokenizers):
            dropped = rng.random(self.batch_size) < self.drop_caption
            kept = ["" if d else c for d, c in zip(dropped, captions, strict=True)]
            batch[f"tokens_{i}"], batch[f"mask_{i}"] = tokenizer(kept)
            told = [a or b for a, b in zip(kept, told, strict=True)]
        return batch, told

    def _scenes(self, number: int) -> tuple[mx.array, list[str]]:
        """Latents and captions of one batch of scenes."""
        start = number * self.batch_size
        pictures, captions = stickers.batch(
            self.seed, start, self.batch_size, self.num_nouns, categories=self.categories
        )
        latents = self.encode(to_float(pictures))
        mx.eval(latents)
        return latents, captions


def sampled_widths(
    widths: Sequence[float], seed: int, step: int, count: int = 1
) -> tuple[float, ...]:
    """The sub-networks of a step: up to `count` of the widths below 1, uniform, widest first.

    They are the same on every machine.
    """
    subs = [w for w in widths if w != 1.0]
    rng = np.random.default_rng((seed, step, 3))
    chosen = rng.choice(subs, min(count, len(subs)), replace=False) if subs else []
    return tuple(sorted(map(float, chosen), reverse=True))


# --- gradients ----------------------------------------------------------------------------------


def noisy(x0: mx.array, key: mx.array, shift: float) -> tuple[mx.array, mx.array, mx.array]:
    """Latents x0 on their way to noise: x_t, the noise levels t (B,), and the velocity there.

    t is logit-normal (SD3), then shifted.
    """
    key_t, key_eps = mx.random.split(key)
    t = shift_time(mx.sigmoid(mx.random.normal((x0.shape[0],), key=key_t)), shift)
    eps = mx.random.normal(x0.shape, key=key_eps)
    return add_noise(x0, eps, t), t, eps - x0


Loss = Callable[..., tuple[mx.array, tuple[mx.array, dict[str, mx.array]]]]
"""(text, mask, width, full) -> (loss, (velocity, metrics)) of the sub-network of `width`.

text and mask (B, L, ...) are the joined text states; `full` is the full network's velocity without
gradient, None when it is the full network's own turn.
"""


def elastic_gradients(
    model: TextToLatents, batch: Batch, widths: Sequence[float], loss: Loss
) -> tuple[dict, dict[str, mx.array]]:
    """Gradients of the full network and of the sub-networks of `widths`, balanced and added.

    Args:
        model: `TextToLatents`, or one with further parts of its own that `loss` uses.
        batch: for text encoder i `tokens_i` and `mask_i` (B, L).
        widths: the sampled sub-networks'; without any the full network trains alone.

    Returns:
        gradients like `model.trainable_parameters()`, and the metrics of all losses.
    """
    transformer, encoders = model.transformer, model.text_encoders
    params = {k: v for k, v in model.trainable_parameters().items() if k != "text_encoders"}
    masks = [batch[f"mask_{i}"] for i in range(len(encoders))]

    def encode(*flat: mx.array) -> list[mx.array]:
        for encoder, leaves in zip(encoders, _chunks(flat, names), strict=True):
            encoder.update(tree_unflatten(leaves))
        return [e(batch[f"tokens_{i}"], masks[i]) for i, e in enumerate(encoders)]

    def loss_fn(params, states, width, full):
        model.update(params)
        text, mask = transformer.encode_text(
            [TextStates(s, m) for s, m in zip(states, masks, strict=True)]
        )
        return loss(text, mask, width, full)

    grad_fn = mx.value_and_grad(loss_fn, argnums=(0, 1))
    names = [[k for k, _ in tree_flatten(e.trainable_parameters())] for e in encoders]
    text_params = [p for e in encoders for _, p in tree_flatten(e.trainable_parameters())]
    states = encode(*text_params)
    (_, (full, metrics)), grads = grad_fn(params, states, 1.0, None)
    sub_grads = []
    for width in widths:
        (_, (_, more)), grads_of_width = grad_fn(params, states, width, mx.stop_gradient(full))
        sub_grads.append(grads_of_width)
        metrics |= more
    grads = add_balanced(grads, *sub_grads)
    model.update(params)
    # The text encoders run once for all widths: pull the states' gradient through them here.
    _, text_grads = mx.vjp(encode, text_params, list(grads[1]))
    encode(*text_params)
    text_grads = [tree_unflatten(g) for g in _chunks(text_grads, names)]
    return grads[0] | {"text_encoders": text_grads}, metrics


def _chunks(flat: Sequence[mx.array], names: list[list[str]]) -> list[list[tuple]]:
    """Cut a flat list of parameters into (name, parameter) lists, one per encoder."""
    out, start = [], 0
    for keys in names:
        out.append(list(zip(keys, flat[start : start + len(keys)], strict=True)))
        start += len(keys)
    return out


def add_balanced(full, *subs):
    """full + the sum of s_i * subs[i], with s_i such that all parts have the same global norm."""
    norm, *others = (
        mx.sqrt(sum(g.square().sum() for _, g in tree_flatten(tree))) for tree in (full, *subs)
    )
    total = full
    for sub, other in zip(subs, others, strict=True):
        scale = norm / mx.maximum(other, 1e-12)
        total = tree_map(lambda a, b, s=scale: a + s * b, total, sub)
    return total


# --- command line -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every trainer of a supernetwork."""
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step and process")
    parser.add_argument(
        "--noises-per-scene",
        type=int,
        default=1,
        metavar="K",
        help="micro-batches per step that show the same scenes under different noise",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=3e-4,
        help="AdamW's; Muon's matrices take 20 times that (default 3e-4, for Muon: at 1e-3 the "
        "loss rises again)",
    )
    parser.add_argument("--final-learning-rate", type=float, default=1e-5)
    parser.add_argument(
        "--optimizer",
        choices=["muon", "adamw"],
        default="muon",
        help="muon learns what the words mean in fewer steps, each a third dearer on a CPU",
    )
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    parser.add_argument("--drop-caption", type=float, default=0.1)
    parser.add_argument(
        "--time-shift",
        type=float,
        default=4.0,
        help="towards noisy pictures, where the prompt counts (default 4)",
    )
    parser.add_argument("--num-nouns", type=int, help="train on the first N nouns only")
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=list(CATEGORIES),
        metavar="NAME",
        help="train on these kinds of scenes alone, as a first stage: " + ", ".join(CATEGORIES),
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        choices=list(WIDTH_NAMES),
        default=list(WIDTH_NAMES),
        help="widths to train; 'full' alone takes two thirds of the time of a step",
    )
    parser.add_argument(
        "--sub-networks",
        type=int,
        default=1,
        metavar="N",
        help="sub-networks per step beside the full network (default 1, as in the paper)",
    )
    parser.add_argument(
        "--save-memory",
        action="store_true",
        help="compute the blocks again for the backward pass: half the memory, a third more time",
    )
    parser.add_argument("--init-from", type=Path, help="run or model folder to start from")
    parser.add_argument("--seed", type=int, default=0)


def make_data(
    args: argparse.Namespace, autoencoder: Autoencoder, tokenizers: Sequence[Tokenizer]
) -> Data:
    """Batches as the options of `add_arguments` want them."""
    return Data(
        autoencoder,
        tokenizers,
        args.batch_size,
        args.num_nouns,
        args.seed,
        args.drop_caption,
        args.categories,
        args.noises_per_scene,
    )


def training_config(args: argparse.Namespace) -> TrainingConfig:
    """Loop settings from the options of `add_arguments`."""
    return TrainingConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        accumulate=args.noises_per_scene,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        final_learning_rate=args.final_learning_rate,
        warmup_steps=args.warmup_steps,
        ema_decay=args.ema_decay,
        checkpoint_every=args.checkpoint_every,
        seed=args.seed,
    )
