"""What flow matching and distillation share: the elastic student, its data and its gradients.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2), and their gradients are brought to the same norm before they are added.
What each of them learns is the trainer's own loss. The text encoders learn along.

`--sub-networks 2` runs two sub-networks in a step. They cost little beside the full one, and with
the paper's single one each of them learns in only half of the steps.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import TextStates, Tokenizer
from mlx_snapgen.sampling import shift_time
from train.data.source import Batch
from train.objectives.losses import add_noise


class TextToLatents(nn.Module):
    """Transformer and text encoders, the parts that train together."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer]):
        super().__init__()
        self.config = config
        self.transformer = EfficientDiT(config.transformer)
        self.text_encoders = [
            new_text_encoder(c, t) for c, t in zip(config.text_encoders, tokenizers, strict=True)
        ]


# --- data ---------------------------------------------------------------------------------------


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
