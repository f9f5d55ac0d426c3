"""Choose the layers of a transformer that get larger palettes (SnapGen++ section 6).

The sensitivity of a layer is the mean squared error of its output, over calibration prompts, when
it alone has a palette of 16 numbers. The most sensitive layers get 256 numbers, as many layers as
the average number of bits allows.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import ElasticLinear
from mlx_snapgen.quantize.palettes import HIGH, LOW, Palettes, layers, palettized
from mlx_snapgen.settings import DrawSettings

MOST_STEPS = 8
"""Maximum number of steps of a calibration picture."""

PROMPTS = (
    "a red apple",
    "a portrait of an old fisherman, soft light",
    "a city street at night in the rain",
    "a watercolour of mountains above a lake",  # its spelling affects which palettes are chosen
)


class _Probe(nn.Module):
    """A layer that measures the error of its output when its weight has `LOW` bits."""

    def __init__(self, layer: Any, report: Callable[[float], object]):
        super().__init__()
        self.linear, self._report = layer, report
        self._delta = palettized(layer.weight, LOW) - layer.weight

    @property
    def bias(self) -> mx.array:
        # The network reads its dtype from a layer's bias.
        return self.linear.bias

    def __call__(self, x: mx.array, share: float = 1.0) -> mx.array:
        delta, elastic = self._delta, isinstance(self.linear, ElasticLinear)
        if elastic:
            delta = self.linear.slice_inputs(self.linear.slice_outputs(delta, share), share)
        self._report((x @ delta.T).square().mean().item())
        return self.linear(x, share) if elastic else self.linear(x)


@contextlib.contextmanager
def _probed(network: EfficientDiT) -> Iterator[dict[str, list[float]]]:
    """Name of a layer -> its errors, one for each run of the network inside the block."""
    errors: dict[str, list[float]] = {}
    chosen = {id(layer): name for name, some in layers(network).items() for layer in some}
    own = {path: m for path, m in linear_layers(network).items() if id(m) in chosen}
    for path, layer in own.items():
        found = errors.setdefault(chosen[id(layer)], [])
        network.update_modules(tree_unflatten([(path, _Probe(layer, found.append))]))
    try:
        yield errors
    finally:
        network.update_modules(tree_unflatten(list(own.items())))


def sensitivities(network: EfficientDiT, run: Callable[[], object]) -> dict[str, float]:
    """Name of each layer that `run` uses -> MSE of its output when it alone has `LOW` bits.

    Args:
        run: calls `network` with the inputs to calibrate on.
    """
    with _probed(network) as errors:
        run()
    return {name: float(np.mean(found)) for name, found in errors.items() if found}


def choose_bits(
    errors: Mapping[str, float], sizes: Mapping[str, int], *, average: float
) -> dict[str, int]:
    """Bits of each layer, at most `average` over all weights.

    Args:
        errors: name -> MSE, from `sensitivities`.
        sizes: name -> number of weights.
        average: from `LOW` to `HIGH`.

    Raises:
        UserError: `average` is out of this range.
    """
    if not LOW <= average <= HIGH:
        raise UserError(f"weights take {LOW} to {HIGH} bits on average, not {average:g}")
    bits = dict.fromkeys(errors, LOW)
    budget = (average - LOW) * sum(sizes[name] for name in errors)
    for name in sorted(errors, key=errors.__getitem__, reverse=True):
        cost = (HIGH - LOW) * sizes[name]
        if cost <= budget:
            bits[name], budget = HIGH, budget - cost
    return bits


def choose_palettes(
    components: Components,
    average: float,
    *,
    widths: Mapping[str, float],
    prompts: Sequence[str] | None = None,
) -> Palettes:
    """Palettes for a model, chosen by sensitivity at the widest of `widths`.

    Args:
        components: in float32, with the few-step LoRA merged if it is used.
        widths: name -> share of the hidden dimensions, of `components.transformer`.
        prompts: calibration prompts; None makes some from the model's vocabulary.
    """
    network, share = components.transformer, max(widths.values())
    prompts = list(prompts or calibration_prompts(components.vocabulary))
    seeds = range(len(prompts))

    def run() -> None:
        steps = min(MOST_STEPS, components.config.sampler_for().num_inference_steps)
        settings = DrawSettings(num_inference_steps=steps)
        draw_latents(components, prompts, seeds=seeds, settings=settings, share=share)

    errors = sensitivities(network, run)
    sizes = {name: sliced_size(some[0], share) for name, some in layers(network).items()}
    return Palettes(
        average_bits=average,
        bits=choose_bits(errors, sizes, average=average),
        mse=errors,
        prompts=prompts,
        widths=list(widths),
    )


def sliced_size(layer: nn.Module, share: float) -> int:
    """Number of weights of a layer in the sub-network of `share`."""
    return (layer.sliced(share) if isinstance(layer, ElasticLinear) else layer)["weight"].size


def calibration_prompts(vocabulary: Mapping[str, Any] | None) -> list[str]:
    """Calibration prompts, made from the model's vocabulary if it has one."""
    words = vocabulary or {}
    if not (nouns := words.get("nouns")):
        return list(PROMPTS)
    colors = words.get("colours") or [""]
    chosen = [nouns[i * len(nouns) // 4] for i in range(4)]
    phrases = [f"{colors[i % len(colors)]} {n}".strip() for i, n in enumerate(chosen)]
    return [f"an {p}" if p[0] in "aeiou" else f"a {p}" for p in phrases]
