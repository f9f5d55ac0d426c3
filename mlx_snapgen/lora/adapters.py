"""LoRA: low-rank adapters of linear layers, at every width of an elastic network.

A layer with adapters computes y = base(x) + sum_i weight_i * alpha_i / rank_i * (x A_i^T) B_i^T,
with A (rank, in) and B (out, rank). At width m the columns of A and the rows of B are sliced by the
rule of the base layer, so B A is sliced exactly like the base weight. One adapter serves all
widths, and merging it at full width merges it at every width. `mlx_snapgen/lora/files.py` reads and
writes adapters.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.lora.things import remove_things
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import ElasticLinear, QuantizedElasticLinear, sliced_parameters
from mlx_snapgen.networks.products import product


class Adapter(nn.Module):
    """One low-rank update B A of a layer.

    Args:
        a: (rank, in).
        b: (out, rank).
        alpha: the update is scaled by alpha / rank.
        weight: a further factor, a plain number; at 0 the layer ignores the adapter.
        widths: names of the network's widths that it was trained at, with commas; "": not known.
        codes: numbers of the codes of a thing that it teaches, see `lora.things`.
    """

    def __init__(
        self,
        a: mx.array,
        b: mx.array,
        *,
        alpha: float,
        weight: float = 1.0,
        widths: str = "",
        codes: tuple[int, ...] = (),
    ):
        super().__init__()
        self.a, self.b = a, b
        self.alpha, self.weight, self.widths, self.codes = alpha, weight, widths, codes

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """weight * alpha / rank; at 0 the adapter is off."""
        return self.weight * self.alpha / self.rank


class LoRALinear(nn.Module):
    """A linear layer (elastic, quantized or plain) with named adapters."""

    def __init__(self, linear: Any):
        super().__init__()
        self.linear = linear
        self.adapters: dict[str, Adapter] = {}

    # Networks read their dtype from a layer's bias or weight.
    @property
    def bias(self) -> mx.array:
        return self.linear.bias

    @property
    def weight(self) -> mx.array:
        return self.linear.weight

    def active(self) -> list[Adapter]:
        """The adapters that are on."""
        return [adapter for adapter in self.adapters.values() if adapter.scale]

    def matrices(self, adapter: Adapter, share: float) -> tuple[mx.array, mx.array]:
        """`adapter`'s A and B in the sub-network of `share`."""
        if isinstance(self.linear, ElasticLinear):
            a = self.linear.slice_inputs(adapter.a, share)
            return a, self.linear.slice_outputs(adapter.b, share)
        return adapter.a, adapter.b

    def __call__(self, x: mx.array, share: float = 1.0) -> mx.array:
        elastic = isinstance(self.linear, (ElasticLinear, QuantizedElasticLinear))
        y = self.linear(x, share) if elastic else self.linear(x)
        for adapter in self.active():
            a, b = self.matrices(adapter, share)
            y = y + (adapter.scale * product(product(x, a), b)).astype(y.dtype)
        return y

    def sliced(self, share: float) -> dict[str, Any]:
        """Parameters of the sub-network of `share` (see `elastic.sliced_parameters`)."""
        pairs = {name: self.matrices(adapter, share) for name, adapter in self.adapters.items()}
        return {
            "linear": sliced_parameters(self.linear, share),
            "adapters": {name: {"a": a, "b": b} for name, (a, b) in pairs.items()},
        }

    def around(self, linear: nn.Module, share: float) -> "LoRALinear":
        """These adapters at `share` around another layer (see `elastic.extract`)."""
        other = LoRALinear(linear)
        for name, adapter in self.adapters.items():
            pair = self.matrices(adapter, share)
            other.adapters[name] = Adapter(
                *pair,
                alpha=adapter.alpha,
                weight=adapter.weight,
                widths=adapter.widths,
                codes=adapter.codes,
            )
        return other


def add_lora(
    module: nn.Module,
    rank: int,
    *,
    alpha: float,
    targets: Sequence[str],
    name: str = "default",
) -> list[str]:
    """Add a new adapter to layers; freezes nothing (see `train_only`).

    A is uniform in +-1/sqrt(in) and B is zero, so at first the output does not change. Both are
    float32, independent of the type of the base.

    Args:
        module: the network, changed in place.
        rank: of the update; at least 1.
        alpha: the update is scaled by alpha / rank.
        targets: patterns with the wildcards * ? [ ] of `fnmatch`. Each must match the whole dotted
            path of a linear layer, or its end from a dot on: "q_proj", "self_attention.*_proj" and
            "down_blocks.*" are patterns; * matches dots as well.
        name: the adapter's, to switch and save it by.

    Returns:
        Paths of the layers that have it.

    Raises:
        UserError: a pattern that matches no layer, or an invalid rank, alpha (0 trains nothing) or
            name.
    """
    targets = [targets] if isinstance(targets, str) else targets
    if rank < 1 or not math.isfinite(alpha) or alpha == 0:
        raise UserError(
            f"a LoRA needs a rank from 1 and a finite alpha other than 0, got {rank} and {alpha}"
        )
    if not targets:
        raise UserError("a LoRA needs at least one target")
    layers = linear_layers(module)
    chosen: set[str] = set()
    for target in targets:
        matched = {p for p in layers if fnmatchcase(p, target) or fnmatchcase(p, f"*.{target}")}
        if not matched:
            raise UserError(f"no linear layer matches '{target}'{_near(target, layers)}")
        chosen |= matched
    adapters = {}
    for path in sorted(chosen):
        out_dims, in_dims = layer_dims(layers[path])
        bound = in_dims**-0.5
        a = mx.random.uniform(-bound, bound, (rank, in_dims))
        adapters[path] = Adapter(a, mx.zeros((out_dims, rank)), alpha=alpha)
    attach(module, adapters, name=name)
    return list(adapters)


def train_only(module: nn.Module, *names: str) -> None:
    """Freeze all of `module` except the adapters of these names."""
    module.freeze()
    for layer in adapted_layers(module).values():
        for name in names:
            if name in layer.adapters:
                layer.adapters[name].unfreeze()


# --- weights of adapters ------------------------------------------------------------------------


def get_lora_weights(module: nn.Module) -> dict[str, float]:
    """Name -> weight of all adapters in `module`."""
    layers = adapted_layers(module).values()
    return {name: a.weight for layer in layers for name, a in layer.adapters.items()}


def set_lora_weights(module: nn.Module, weights: Mapping[str, float]) -> None:
    """Set the weights of adapters; the others keep theirs. An adapter at 0 has no effect.

    A weight is a plain number, which is a constant for `mx.compile`. A compiled function must set
    it itself, or take it as an argument: later changes outside have no effect on it.

    Raises:
        UserError: no adapter of that name, or a weight that is not finite.
    """
    known = get_lora_weights(module)
    for name, weight in weights.items():
        if name not in known:
            have = ", ".join(known) or "none"
            raise UserError(f"no LoRA '{name}'{nearest(name, known)}: there is {have}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of a LoRA must be a finite number, got {weight}")
    for layer in adapted_layers(module).values():
        for name, adapter in layer.adapters.items():
            adapter.weight = float(weights.get(name, adapter.weight))


@contextlib.contextmanager
def lora_weights(module: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """`set_lora_weights` inside a block; base weights are neither copied nor changed.

    The few-step teacher is the teacher inside `with lora_weights(teacher, {"few_step": 1.0}):`. To
    differentiate a network with checkpointed blocks, put the whole `mx.grad` call inside: the
    backward pass recomputes the blocks with the weights that are set at that time.
    """
    before = get_lora_weights(module)
    set_lora_weights(module, weights)
    try:
        yield
    finally:
        set_lora_weights(module, {name: before[name] for name in weights})


def with_lora_weights(module: nn.Module, weights: Mapping[str, float]) -> Callable[..., Any]:
    """A function that calls `module` inside `lora_weights(module, weights)`."""

    def call(*args, **settings):
        with lora_weights(module, weights):
            return module(*args, **settings)

    return call


def remove_lora(
    module: nn.Module, names: Sequence[str] | None = None, *, autoencoder: Any = None
) -> None:
    """Remove adapters (all by default); a layer without adapters becomes its base layer.

    Args:
        autoencoder: that has their things, which are removed too; None: none has.
    """
    codes: set[int] = set()
    for path, layer in adapted_layers(module).items():
        for name in list(layer.adapters) if names is None else names:
            removed = layer.adapters.pop(name, None)
            codes |= {*(removed.codes if removed else ())}
        if not layer.adapters:
            module.update_modules(tree_unflatten([(path, layer.linear)]))
    if codes and autoencoder is not None:
        remove_things(autoencoder, sorted(codes))


def fuse_lora(module: nn.Module) -> list[str]:
    """Merge the active adapters into the base weights, for all widths, and remove them.

    Quantized layers are refused, because quantizing the sum again has a larger error than the LoRA
    itself: at 4 bits 3.4 times an update of 1% of the weights. Merge first, then quantize. An
    adapter of a quantized layer works without merging.

    Returns:
        Names of the merged adapters. Adapters at weight 0 are not removed.

    Raises:
        UserError: an active adapter of a quantized layer; the module is unchanged.
    """
    active = {path: layer for path, layer in adapted_layers(module).items() if layer.active()}
    for path, layer in active.items():
        if isinstance(layer.linear, nn.QuantizedLinear):
            raise UserError(f"{path} is quantized: fuse the LoRA first, then quantize")
    fused = [name for name, weight in get_lora_weights(module).items() if weight]
    for layer in active.values():
        weight = layer.linear.weight
        total = weight.astype(mx.float32)
        for adapter in layer.active():
            a, b = adapter.a.astype(mx.float32), adapter.b.astype(mx.float32)
            total = total + adapter.scale * (b @ a)
        layer.linear.weight = total.astype(weight.dtype)
        # One by one, so that peak memory grows by one layer only.
        mx.eval(layer.linear.weight)
    remove_lora(module, fused)
    return fused


@contextlib.contextmanager
def without_lora(module: nn.Module) -> Iterator[None]:
    """Inside the block, `module` has no adapters and the parameter names of its base."""
    layers = adapted_layers(module)
    module.update_modules(tree_unflatten([(path, m.linear) for path, m in layers.items()]))
    try:
        yield
    finally:
        module.update_modules(tree_unflatten(list(layers.items())))


# --- layers -------------------------------------------------------------------------------------


def adapted_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Dotted path -> layer, of those with adapters."""
    return {p: m for p, m in linear_layers(module).items() if isinstance(m, LoRALinear)}


def linear_layers(module: nn.Module) -> dict[str, Any]:
    """Dotted path -> linear layer below `module`, those with adapters as `LoRALinear`."""
    kinds = (LoRALinear, ElasticLinear, nn.Linear, nn.QuantizedLinear)
    found = {p: m for p, m in module.named_modules() if p and isinstance(m, kinds)}
    inner = {f"{p}.linear" for p, m in found.items() if isinstance(m, LoRALinear)}
    return {p: found[p] for p in sorted(found) if p not in inner}


def _base(layer: Any) -> Any:
    return layer.linear if isinstance(layer, LoRALinear) else layer


def layer_dims(layer: Any) -> tuple[int, int]:
    """(out, in) at full width."""
    layer = _base(layer)
    if isinstance(layer, nn.QuantizedLinear):
        return layer.weight.shape[0], layer.scales.shape[1] * layer.group_size
    return layer.weight.shape


def layer_dtype(layer: Any) -> mx.Dtype:
    """Floating type of the weight, or of the scales if it is quantized."""
    layer = _base(layer)
    return (layer.scales if isinstance(layer, nn.QuantizedLinear) else layer.weight).dtype


def attach(module: nn.Module, adapters: Mapping[str, Adapter], *, name: str) -> None:
    """Add adapters to the layers of `module`; the keys are paths of layers."""
    if not re.fullmatch(r"[a-zA-Z][\w-]*", name, flags=re.A):
        raise UserError(f"a LoRA's name is letters, digits, - and _, got '{name}'")
    if name in get_lora_weights(module):
        raise UserError(f"there is a LoRA '{name}' already: give this one another name")
    layers = linear_layers(module)
    for path, adapter in adapters.items():
        layer = layers[path]
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            module.update_modules(tree_unflatten([(path, layer)]))
        layer.adapters[name] = adapter


def _near(target: str, paths: Mapping[str, Any]) -> str:
    """Paths, or their ends from a dot on, that look like the pattern `target`."""
    ends = {path[m.end() :] for path in paths for m in re.finditer(r"^|\.", path)}
    close = difflib.get_close_matches(target, sorted(ends), n=3, cutoff=0.4)
    return f" (near it: {', '.join(close)})" if close else ""


@contextlib.contextmanager
def active_adapters(network: EfficientDiT, *names: str) -> Iterator[None]:
    """Inside the block, only the adapters `names` are on (teacher, student or critic)."""
    weights = {name: float(name in names) for name in get_lora_weights(network)}
    with lora_weights(network, weights):
        yield
