"""Elastic training, shared by flow matching and distillation: the model and its gradients.

Every step runs the full network and one sampled sub-network on the same noisy latents
(SnapGen++ section 3.2). Their gradients are scaled to the same norm before they are added. The
objective defines the loss of each. Text encoders of kind "transformer" are trained too, all others
are frozen.

`--sub-networks 2` runs two sub-networks in a step. They cost little compared with the full network.
With one, as in the paper, each sub-network is trained in only half of the steps.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import ModelConfig, resolution_shift
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import ElasticLinear, narrowed
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.networks.text_encoders.base import TextStates, Tokenizer
from mlx_snapgen.sampling import add_noise, shift_time
from train.data.source import Batch
from train.data.streams import Stream
from train.data.text import is_trained
from train.objectives.base import Metrics, value_and_grad
from train.objectives.losses import expand


@dataclass(frozen=True)
class _Frozen:
    """Text encoders outside the module tree, by index."""

    encoders: Mapping[int, Any]


class TextToLatents(nn.Module):
    """Transformer and trained text encoders: the parts that are trained together.

    Frozen text encoders are not in the module tree, so not in checkpoints, averages and optimizer.

    Args:
        tokenizers: one for each text encoder; that of a frozen one is not used.
        frozen: index -> text encoder that is not trained; one that is missing is None in
            `encoders`.

    Attributes:
        text_encoders: the trained ones, in order.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizers: Sequence[Tokenizer | None],
        *,
        frozen: Mapping[int, Any] | None = None,
    ):
        super().__init__()
        self.config = config
        self.transformer = EfficientDiT(config.transformer)
        pairs = zip(config.text_encoders, tokenizers, strict=True)
        self.text_encoders: list[Any] = [new_text_encoder(c, t) for c, t in pairs if is_trained(c)]
        self._frozen = _Frozen(dict(frozen or {}))

    @property
    def encoders(self) -> list[Any]:
        """All text encoders of the model in order; None for a frozen one that is not loaded."""
        trained = iter(self.text_encoders)
        return [
            next(trained) if is_trained(c) else self._frozen.encoders.get(i)
            for i, c in enumerate(self.config.text_encoders)
        ]

    @classmethod
    def of(cls, components: Components) -> "TextToLatents":
        """The networks of a loaded model."""
        model = cls(components.config, [None] * len(components.text_encoders))
        model.adopt(components)
        return model

    def adopt(self, components: Components) -> None:
        """Train the networks of a loaded model, whose sizes are those of `config`."""
        self.transformer = components.transformer
        configs = self.config.text_encoders
        pairs = list(zip(configs, components.text_encoders, strict=True))
        self.text_encoders = [encoder for c, encoder in pairs if is_trained(c)]
        frozen = {i: encoder for i, (c, encoder) in enumerate(pairs) if not is_trained(c)}
        self._frozen = _Frozen(frozen)


class ElasticStep(NamedTuple):
    """Arguments of a step of elastic training."""

    shares: tuple[float, ...]
    """Of the sampled sub-networks; if empty, only the full network is trained."""
    shift: float | None
    """Timestep shift of the noise levels; None: by the resolution of the batch."""
    early: float = 0.0
    """Share of the samples at noise levels of `EARLY` and above."""


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


EARLY = 0.88
"""The least of the noise levels at which a picture's layout is decided."""


def noisy(
    x0: mx.array,
    key: mx.array,
    *,
    shift: float | None,
    patch_size: int = 2,
    early: float = 0.0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Latents x0 with noise: x_t, the noise levels t (B,), and the velocity there.

    t is logit-normal (SD3), then shifted.

    Args:
        shift: None: by the number of tokens, patches of `patch_size`.
        early: share of the samples whose t is from `EARLY` to 1, mostly near 1, instead.
    """
    if shift is None:
        shift = latents_shift(x0, patch_size=patch_size)
    key_t, key_eps = mx.random.split(key)
    t = shift_time(mx.sigmoid(mx.random.normal((x0.shape[0],), key=key_t)), shift)
    if early:
        which, level = mx.random.uniform(shape=(2, len(x0)), key=mx.random.split(key, 4)[3])
        t = mx.where(which < early, 1 - (1 - EARLY) * level.square(), t)
    eps = mx.random.normal(x0.shape, key=key_eps)
    return add_noise(x0, eps, expand(t, x0)), t, eps - x0


def latents_shift(latents: mx.array, *, patch_size: int) -> float:
    """`resolution_shift` of latents (B, h, w, C)."""
    return resolution_shift(latents.shape[1] * latents.shape[2] // patch_size**2)


def encode_trained(model: TextToLatents, batch: Batch) -> list[mx.array]:
    """States (B, L, D) of the trained text encoders; finite also where no token counts."""
    trained = [i for i, c in enumerate(model.config.text_encoders) if is_trained(c)]
    states = []
    for i, encoder in zip(trained, model.text_encoders, strict=True):
        mask = batch[f"mask_{i}"]
        # Attention over no token at all is not a number; nothing uses the states of such a row.
        states.append(encoder(batch[f"tokens_{i}"], mask | ~mask.any(axis=-1, keepdims=True)))
    return states


def text_states(
    model: TextToLatents, batch: Batch, *, trained: Sequence[mx.array] | None = None
) -> list[TextStates]:
    """The states of all text encoders for a batch, for `EfficientDiT.encode_text`.

    Args:
        trained: from `encode_trained`, which None calls.
    """
    own = iter(encode_trained(model, batch) if trained is None else trained)
    states = []
    for i, config in enumerate(model.config.text_encoders):
        found = next(own) if is_trained(config) else batch[f"states_{i}"]
        states.append(TextStates(found.astype(model.transformer.dtype), batch[f"mask_{i}"]))
    return states


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
        batch: for text encoder i `mask_i` (B, L) and, if it is trained, `tokens_i` (B, L), else
            `states_i` (B, L, D).
        shares: of the sampled sub-networks; if empty, only the full network is trained.

    Returns:
        gradients like `model.trainable_parameters()`, and the metrics of all losses.
    """
    transformer, encoders = model.transformer, model.text_encoders
    trained = [flat_parameters(encoder.trainable_parameters()) for encoder in encoders]

    def encode(*flat: mx.array) -> list[mx.array]:
        for encoder, leaves in zip(encoders, _chunks(flat, trained), strict=True):
            encoder.update(dict(tree_unflatten(leaves)))
        return encode_trained(model, batch)

    def gradients(share: float, full: mx.array | None):
        def of_states(states):
            joined = text_states(model, batch, trained=states)
            return loss(*transformer.encode_text(joined), share, full)

        params = {k: v for k, v in model.trainable_parameters().items() if k != "text_encoders"}
        return value_and_grad(model, of_states, [states], parameters=params)

    def sub_gradients(share: float, full: mx.array):
        with narrowed(transformer, share) as layers:
            value, (grads, of_text) = gradients(share, full)

        def cut(path: str, grad: mx.array) -> "mx.array | SliceGradient":
            layer = layers.get(path.rpartition(".")[0].removeprefix("transformer."))
            return grad if layer is None else SliceGradient(grad, layer, share)

        return value, (tree_map_with_path(cut, grads), of_text)

    text_params = [p for parameters in trained for p in parameters.values()]
    states = encode(*text_params)
    (_, (full, metrics)), grads = gradients(1.0, None)
    sub_grads = []
    for share in shares:
        (_, (_, more)), grads_of_share = sub_gradients(share, mx.stop_gradient(full))
        sub_grads.append(grads_of_share)
        metrics |= more
    grads = add_balanced(grads, *sub_grads)
    if not encoders:
        return grads[0], metrics
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


@dataclass(frozen=True)
class SliceGradient:
    """The gradient of a layer's weight or bias in the sub-network of `share`, of its size."""

    value: mx.array
    layer: ElasticLinear
    share: float

    def added_to(self, whole: mx.array, scale: mx.array) -> mx.array:
        """`whole`, of the full network, with `scale` times this gradient in its place."""
        return self.layer.add_to_slice(whole, scale * self.value, self.share)


def add_balanced(full, *subs):
    """full + the sum of s_i * subs[i], with s_i such that all parts have the same global norm.

    A leaf of `subs` may be a `SliceGradient`.
    """

    def add(whole: mx.array, part: "mx.array | SliceGradient", scale: mx.array) -> mx.array:
        if isinstance(part, SliceGradient):
            return part.added_to(whole, scale).astype(whole.dtype)
        return (whole + scale * part).astype(whole.dtype)

    norm, *others = (_norm(tree) for tree in (full, *subs))
    total = full
    for sub, other in zip(subs, others, strict=True):
        scale = norm / mx.maximum(other, 1e-12)
        total = tree_map(functools.partial(add, scale=scale), total, sub)
    return total


def _norm(tree: Any) -> mx.array:
    # In float32: a sum of bfloat16 stops growing at 256 times its terms.
    flat: Any = tree_flatten(tree)
    leaves = (g.value if isinstance(g, SliceGradient) else g for _, g in flat)
    # Rows first: the CPU adds the numbers of a whole array one by one, and loses .3% of the sum.
    rows = (g.astype(mx.float32).reshape(-1, g.shape[-1] if g.ndim else 1) for g in leaves)
    squares = (g.square().sum(axis=0).sum() for g in rows)
    return mx.sqrt(functools.reduce(mx.add, squares))
