"""The product x W^T + b of every elastic and LoRA layer, and how its gradients are laid out.

On the CPU a batch of pictures gives each exactly the numbers that it has alone: a BLAS library
chooses its kernel by the shape of a product, so that a row may be rounded in another way if more
rows are multiplied with it. `apart` marks a batch of pictures, and `product` multiplies them
together only if that gives the same bits; otherwise it multiplies each picture by itself. On a GPU,
and in other types than float32, all pictures are multiplied together.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.networks.exponentials import float32_on_cpu
from mlx_snapgen.networks.parallel import at_once, cut, group_count, part_count

_PICTURES = ContextVar("pictures", default=1)
_TRAINED = ContextVar("trained", default=False)
LEAST_COMPARED = 1 << 12
"""Numbers that are compared at least before rows count as equal."""


@contextlib.contextmanager
def apart(pictures: int) -> Iterator[None]:
    """Inside, a network is called with a batch of so many pictures.

    Row j * pictures + k of the batch is of picture k, and has j = 0, 1 with guidance. All pictures
    have the same noise level.
    """
    token = _PICTURES.set(pictures)
    try:
        yield
    finally:
        _PICTURES.reset(token)


def pictures_apart() -> int:
    """The number of pictures in the batch that the network computes; 1 outside of `apart`."""
    return _PICTURES.get()


def by_pictures(function: Callable[..., mx.array], *batches: mx.array | None) -> mx.array:
    """function(*batches) inside of `apart`, for groups of the pictures at once.

    The rows of the batches and of the result are those of `apart`.
    """
    pictures = pictures_apart()
    groups = min(group_count(), pictures)
    if groups == 1:
        return function(*batches)
    split = [a if a is None else a.reshape(-1, pictures, *a.shape[1:]) for a in batches]

    def of_group(here: slice) -> mx.array:
        count = here.stop - here.start
        with apart(count):
            x = function(*(a if a is None else a[:, here].flatten(0, 1) for a in split))
        return x.reshape(-1, count, *x.shape[1:])

    parts = [functools.partial(of_group, here) for here in cut(pictures, groups)]
    return mx.concatenate(at_once(parts), axis=1).flatten(0, 1)


@contextlib.contextmanager
def trained() -> Iterator[None]:
    """Inside, where products are differentiated, a weight's gradient is laid out as the weight.

    By itself it is a transposed view, which the CPU adds and updates at a third of the speed.
    """
    token = _TRAINED.set(True)
    try:
        yield
    finally:
        _TRAINED.reset(token)


def product(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x (B, N, in) or (B, in), weight (out, in), bias (out,) -> x W^T + bias.

    In two dimensions, as those of the time embedding, x is of one picture.
    """
    parts = part_count(x.shape[-2] * weight.size) if x.ndim == 3 else 1
    if parts == 1:
        return _each_product(x, weight, bias)
    outputs = at_once(
        [
            functools.partial(_each_product, x, weight[here], None if bias is None else bias[here])
            for here in cut(len(weight), parts)
        ]
    )
    return mx.concatenate(outputs, axis=-1)


def _each_product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    count = pictures_apart()
    if count == 1 or x.ndim != 3 or not float32_on_cpu(x):
        return _product(x, weight, bias)
    b, n, _ = x.shape
    shape = b // count, count, n, *weight.shape
    if _rows_are_equal(shape, bias is not None):
        return _product(x, weight, bias)
    x = x.reshape(b // count, count, n, -1)
    parts = [_product(x[:, k], weight, bias) for k in range(count)]
    return mx.stack(parts, axis=1).reshape(b, n, -1)


def _product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    product: Any = _trained_product if _TRAINED.get() else _plain_product
    return product(x, weight, *(() if bias is None else (bias,)))


def _plain_product(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
    return mx.addmm(bias[0], x, weight.T) if bias else x @ weight.T


_trained_product = mx.custom_function(_plain_product)


@_trained_product.vjp
def _trained_product_vjp(primals, cotangent, _):
    x, weight, *bias = primals
    rows = cotangent.reshape(-1, cotangent.shape[-1])
    found = cotangent @ weight, rows.T @ x.reshape(-1, x.shape[-1]), *(rows.sum(0) for _ in bias)
    # A LoRA in float32 on a network in bfloat16 must not make its whole backward pass float32.
    return [grad.astype(primal.dtype) for grad, primal in zip(found, primals, strict=True)]


@functools.lru_cache(maxsize=1 << 10)
def _rows_are_equal(shape: tuple[int, ...], has_bias: bool) -> bool:
    """Whether the product of all pictures has the bits of the pictures' own products.

    The kernel depends on the shape alone, so that random numbers show it.

    Args:
        shape: rows of the batch per picture, pictures, tokens, outputs, inputs.
    """
    each, count, n, out, inputs = shape
    random = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32))

    weight, bias = normal(out, inputs), normal(out) if has_bias else None
    for _ in range(math.ceil(LEAST_COMPARED / (each * count * n * out))):
        x = normal(each, count, n, inputs)
        together = _product(x.reshape(each * count, n, inputs), weight, bias)
        alone = mx.stack([_product(x[:, k], weight, bias) for k in range(count)], axis=1)
        if not mx.array_equal(together.reshape(alone.shape), alone).item():
            return False
    return True
