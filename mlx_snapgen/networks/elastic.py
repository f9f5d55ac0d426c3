"""The slicing rule of the elastic supernetwork (SnapGen++ section 3), and nothing else.

A sub-network of width m keeps the first m * d of every hidden dimension d: whole heads in
attention, the leading channels elsewhere. Parameters tied to the hidden length (norms,
modulation) exist once per width. `extract` makes a stand-alone network of one width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.networks.products import product


def slice_groups(x: mx.array, axis: int, *, groups: int, share: float) -> mx.array:
    """Keep the leading `share` of each of `groups` equal runs along `axis` (0 or -1)."""
    if share == 1.0:
        return x
    length = x.shape[axis] // groups
    kept = round(length * share)
    if axis == 0:
        return x.reshape(groups, length, *x.shape[1:])[:, :kept].reshape(-1, *x.shape[1:])
    return x.reshape(*x.shape[:-1], groups, length)[..., :kept].reshape(*x.shape[:-1], -1)


class ElasticLinear(nn.Module):
    """y = x W^T + b whose hidden dimensions shrink with the width.

    Args:
        in_dims, out_dims: sizes at full width.
        slice_in, slice_out: which sides are hidden dimensions.
        in_groups, out_groups: number of hidden vectors that the channels consist of: 4 after a 2x2
            space-to-depth. Each is sliced separately.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        *,
        bias: bool = True,
        slice_in: bool = True,
        slice_out: bool = True,
        in_groups: int = 1,
        out_groups: int = 1,
    ):
        super().__init__()
        bound = (3.0 / in_dims) ** 0.5
        self.weight = mx.random.uniform(-bound, bound, (out_dims, in_dims))
        if bias:
            self.bias = mx.zeros((out_dims,))
        self.slice_in, self.slice_out = slice_in, slice_out
        self.in_groups, self.out_groups = in_groups, out_groups
        # Of the sub-network whose weights the layer has, see `narrowed`.
        self._share = 1.0

    def slice_inputs(self, x: mx.array, share: float) -> mx.array:
        """Cut x (..., in_dims) to the inputs of the sub-network of `share`."""
        if not self.slice_in:
            return x
        return slice_groups(x, -1, groups=self.in_groups, share=share)

    def slice_outputs(self, x: mx.array, share: float) -> mx.array:
        """Cut x (out_dims, ...) to the outputs of the sub-network of `share`."""
        if not self.slice_out:
            return x
        return slice_groups(x, 0, groups=self.out_groups, share=share)

    def sliced(self, share: float) -> dict[str, mx.array]:
        """Weight and bias of the sub-network of `share`."""
        if share == self._share:
            return {name: self[name] for name in ("weight", "bias") if name in self}
        if self._share != 1.0 and (self.slice_in or self.slice_out):
            raise ValueError(
                f"narrowed to {self._share:g}, the layer has no other width: {share:g}"
            )
        weight = self.slice_inputs(self.slice_outputs(self.weight, share), share)
        if "bias" not in self:
            return {"weight": weight}
        return {"weight": weight, "bias": self.slice_outputs(self.bias, share)}

    def add_to_slice(self, whole: mx.array, part: mx.array, share: float) -> mx.array:
        """A weight or bias of full width with that of the sub-network of `share` added to it.

        Beside it no array of full width is made, as the gradient of a slice would be.
        """
        runs: list[int] = []
        kept: list[slice] = []
        for axis in range(whole.ndim):
            groups = (self.out_groups, self.in_groups)[axis]
            length = whole.shape[axis] // groups
            is_sliced = (self.slice_out, self.slice_in)[axis]
            runs += [groups, length]
            kept += [slice(None), slice(round(length * share) if is_sliced else length)]
        cells = whole.reshape(runs)
        before = cells[tuple(kept)]
        cells[tuple(kept)] = before + part.reshape(before.shape)
        return cells.reshape(whole.shape)

    def __call__(self, x: mx.array, share: float = 1.0) -> mx.array:
        return product(x, **self.sliced(share))

    def to_quantized(self, group_size: int = 64, bits: int = 4, **kwargs: Any) -> nn.Module:
        """Quantized layer of this width alone (`mlx.nn.quantize` calls this)."""
        return QuantizedElasticLinear.from_linear(self, group_size, bits, **kwargs)


@contextmanager
def narrowed(network: nn.Module, share: float) -> Iterator[dict[str, ElasticLinear]]:
    """Inside, each `ElasticLinear` of `network` has the weights of the sub-network of `share` only.

    So the gradients of these weights have its size. Yields the layers by path.
    """
    layers = {path: m for path, m in network.named_modules() if isinstance(m, ElasticLinear)}
    whole = {path: layer.sliced(1.0) for path, layer in layers.items()}
    try:
        for layer in layers.values():
            # One copy that forward and backward pass share: products copy a slice each time.
            cut = {name: mx.contiguous(value) for name, value in layer.sliced(share).items()}
            layer.update(cut)
            layer._share = share
        yield layers
    finally:
        for path, layer in layers.items():
            layer._share = 1.0
            layer.update(whole[path])


class QuantizedElasticLinear(nn.QuantizedLinear):
    """A quantized `ElasticLinear` of one width, because packed columns cannot be sliced.

    On the CPU, where MLX's quantized product is forty times slower than the dense one, each call
    dequantizes the weight, and so does the gradient with respect to the input. This takes the
    memory of one dense matrix beside the packed weights, or of one for each part that is computed
    at once (see `parallel`).
    """

    def __call__(self, x: mx.array, share: float = 1.0) -> mx.array:
        if share != 1.0:
            raise ValueError("a quantized layer has one width: extract it first, then quantize")
        if mx.default_device().type != mx.DeviceType.cpu:
            return super().__call__(x)

        def dense(after: mx.array) -> mx.array:
            """The weight in the type of `after`, and not before that array exists."""
            [packed] = mx.depends([self.weight], [after])
            weight = mx.dequantize(
                packed, self.scales, self.biases, group_size=self.group_size, bits=self.bits
            )
            return weight.astype(after.dtype)

        @mx.custom_function
        def dense_product(x: mx.array) -> mx.array:
            return product(x, dense(x), self.bias if "bias" in self else None)

        @dense_product.vjp
        def backward(_x, cotangent, _):
            return cotangent @ dense(cotangent)

        return dense_product(x)  # pyright: ignore[reportReturnType]  no types in mlx


class PerWidth(nn.Module):
    """One module per width, for parameters that are tied to the hidden length.

    Args:
        widths: the network's widths.
        make: builds the member of one width, given the width.
    """

    def __init__(self, widths: Sequence[float], make: Callable[[float], nn.Module]):
        super().__init__()
        self._widths = tuple(widths)
        self.members = [make(share) for share in widths]

    def at(self, share: float) -> Any:
        """The member of `share`."""
        return self.members[self._widths.index(share)]

    def sliced(self, share: float) -> dict[str, list]:
        """Parameters of the one member that the sub-network of `share` has."""
        return {"members": [self.at(share).parameters()]}

    def __call__(self, *args: Any, share: float = 1.0) -> Any:
        return self.at(share)(*args)


class Table(nn.Module):
    """A learned (rows, dims) table, initialized to zero as the modulation is."""

    def __init__(self, rows: int, dims: int):
        super().__init__()
        self.weight = mx.zeros((rows, dims))

    def __call__(self) -> mx.array:
        return self.weight


def sliced_parameters(module: Any, share: float) -> Any:
    """Parameters of `module`'s sub-network of `share`, nested like `module.parameters()`.

    A module that depends on the width defines `sliced(share)`; all others are not sliced.
    """
    if isinstance(module, nn.Module):
        if hasattr(module, "sliced"):
            return cast(Any, module).sliced(share)
        items = {k: v for k, v in module.items() if nn.Module.valid_parameter_filter(module, k, v)}
        return {k: sliced_parameters(v, share) for k, v in items.items()}
    if isinstance(module, list):
        return [sliced_parameters(item, share) for item in module]
    return module


Network = TypeVar("Network", bound=nn.Module)


def extract(network: Network, share: float) -> Network:
    """The sub-network of `share` as a stand-alone network with the same outputs.

    The class of `network` is constructed from its config alone, and the config has a method
    `standalone(share)`. A module that wraps one of the network's modules, such as `LoRALinear`,
    defines `around(module, share)`, which returns the same wrapper around `module` at that width.
    """
    make, config = cast(Any, type(network)), cast(Any, network.config)
    alone = _wrapped(make(config.standalone(share)), network, share)
    alone.update(sliced_parameters(network, share))
    return alone


def _wrapped(alone: Any, network: Any, share: float) -> Any:
    """`alone` with the wrappers that `network` has."""
    if hasattr(network, "around"):
        return network.around(alone, share)
    if isinstance(network, PerWidth):
        alone.members[0] = _wrapped(alone.members[0], network.at(share), 1.0)
    elif isinstance(network, list):
        return [_wrapped(a, n, share) for a, n in zip(alone, network, strict=True)]
    elif isinstance(network, nn.Module):
        for key, child in network.children().items():
            alone[key] = _wrapped(alone[key], child, share)
    return alone
