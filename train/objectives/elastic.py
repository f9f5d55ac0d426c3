"""Elastic training, shared by flow matching and distillation: the model and its gradients.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2). Their gradients are scaled to the same norm before they are added. The
objective defines the loss of each. The text encoders are trained too.

`--sub-networks 2` runs two sub-networks in a step. They cost little compared with the full network.
With one, as in the paper, each sub-network is trained in only half of the steps.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import ModelConfig
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.base import TextStates, Tokenizer
from mlx_snapgen.sampling import add_noise, shift_time
from train.data.source import Batch
from train.data.streams import Stream
from train.objectives.base import Metrics, value_and_grad
from train.objectives.losses import expand


class TextToLatents(nn.Module):
    """Transformer and text encoders, the parts that are trained together."""

    def __init__(self, config: ModelConfig, tokenizers: Sequence[Tokenizer]):
        super().__init__()
        self.config = config
        self.transformer = EfficientDiT(config.transformer)
        self.text_encoders = [
            new_text_encoder(c, t) for c, t in zip(config.text_encoders, tokenizers, strict=True)
        ]


class ElasticStep(NamedTuple):
    """Arguments of a step of elastic training."""

    shares: tuple[float, ...]
    """Of the sampled sub-networks; if empty, only the full network is trained."""
    shift: float
    """Timestep shift of the noise levels."""


def sampled_shares(
    shares: Sequence[float], *, seed: int, step: int, count: int = 1
) -> tuple[float, ...]:
    """The sub-networks of a step: up to `count` of the shares below 1, uniform, widest first.

    The choice is the same on every machine.
    """
    subs = [share for share in shares if share != 1.0]
    rng = Stream.SUB_NETWORKS.generator(seed, step)
    chosen = rng.choice(subs, min(count, len(subs)), replace=False) if subs else []
    return tuple(sorted(map(float, chosen), reverse=True))


def noisy(x0: mx.array, key: mx.array, *, shift: float) -> tuple[mx.array, mx.array, mx.array]:
    """Latents x0 with noise: x_t, the noise levels t (B,), and the velocity there.

    t is logit-normal (SD3), then shifted.
    """
    key_t, key_eps = mx.random.split(key)
    t = shift_time(mx.sigmoid(mx.random.normal((x0.shape[0],), key=key_t)), shift)
    eps = mx.random.normal(x0.shape, key=key_eps)
    return add_noise(x0, eps, expand(t, x0)), t, eps - x0


WidthLoss = Callable[
    [mx.array, mx.array, float, mx.array | None], tuple[mx.array, tuple[mx.array, Metrics]]
]
"""(text, mask, share, full) -> (loss, (velocity, metrics)) of the sub-network of `share`.

text and mask (B, L, ...) are the joined text states; `full` is the full network's velocity without
gradient, None for the full network itself.
"""


def elastic_gradients(
    model: TextToLatents, batch: Batch, *, shares: Sequence[float], loss: WidthLoss
) -> tuple[dict[str, Any], Metrics]:
    """Gradients of the full network and of the sub-networks of `shares`, balanced and added.

    Args:
        model: `TextToLatents`, or a subclass with further parts that `loss` uses.
        batch: for text encoder i `tokens_i` and `mask_i` (B, L).
        shares: of the sampled sub-networks; if empty, only the full network is trained.

    Returns:
        gradients like `model.trainable_parameters()`, and the metrics of all losses.
    """
    transformer, encoders = model.transformer, model.text_encoders
    params = {k: v for k, v in model.trainable_parameters().items() if k != "text_encoders"}
    masks = [batch[f"mask_{i}"] for i in range(len(encoders))]
    trained = [flat_parameters(encoder.trainable_parameters()) for encoder in encoders]

    def encode(*flat: mx.array) -> list[mx.array]:
        for encoder, leaves in zip(encoders, _chunks(flat, trained), strict=True):
            encoder.update(dict(tree_unflatten(leaves)))
        return [e(batch[f"tokens_{i}"], masks[i]) for i, e in enumerate(encoders)]

    def gradients(share: float, full: mx.array | None):
        def of_states(states):
            joined = [TextStates(s, m) for s, m in zip(states, masks, strict=True)]
            return loss(*transformer.encode_text(joined), share, full)

        return value_and_grad(model, of_states, [states], parameters=params)

    text_params = [p for parameters in trained for p in parameters.values()]
    states = encode(*text_params)
    (_, (full, metrics)), grads = gradients(1.0, None)
    sub_grads = []
    for share in shares:
        (_, (_, more)), grads_of_share = gradients(share, mx.stop_gradient(full))
        sub_grads.append(grads_of_share)
        metrics |= more
    grads = add_balanced(grads, *sub_grads)
    # The text encoders run once for all widths: pull the states' gradient through them here.
    _, text_grads = mx.vjp(encode, text_params, list(grads[1]))
    encode(*text_params)
    text_grads = [tree_unflatten(g) for g in _chunks(text_grads, trained)]
    return grads[0] | {"text_encoders": text_grads}, metrics


def _chunks(flat: Sequence[mx.array], like: Sequence[Collection[str]]) -> list[list[tuple]]:
    """Cut a flat list of parameters into (name, parameter) lists, with the names of `like`."""
    out, start = [], 0
    for keys in like:
        out.append(list(zip(keys, flat[start : start + len(keys)], strict=True)))
        start += len(keys)
    return out


def add_balanced(full, *subs):
    """full + the sum of s_i * subs[i], with s_i such that all parts have the same global norm."""
    norm, *others = (_norm(tree) for tree in (full, *subs))
    total = full
    for sub, other in zip(subs, others, strict=True):
        scale = norm / mx.maximum(other, 1e-12)
        total = tree_map(lambda a, b, s=scale: a + s * b, total, sub)
    return total


def _norm(tree: Any) -> mx.array:
    squares = (g.square().sum() for g in flat_parameters(tree).values())
    return mx.sqrt(functools.reduce(mx.add, squares))
