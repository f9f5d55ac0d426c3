"""The widths of one supernetwork in tiles, so that a package of several stores each weight once.

A narrower network's weight is the corner of the wider one's (mlx_snapgen/networks/elastic.py). As a
tensor of its own it would be stored a second time. In tiles, a layer is computed width by width,
the narrowest first: the next width adds the product with its further inputs (`right`), and appends
its further outputs (`below`). Each tile is a convolution with the same weight at every width that
has it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convert.pytorch.efficient_dit import LongSkip

Layers = dict[str, list[nn.Conv2d]]
"""Path of a layer -> the convolutions that hold its weights, each once."""


class TiledConv(nn.Module):
    """A linear layer or convolution in tiles, those of narrower widths first.

    Args:
        sizes: (outputs, inputs) of each width up to this one's, narrowest first.
        right, below: for each width the tiles of its further inputs and of its further outputs;
            None if it has none.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        right: Sequence[nn.Conv2d | None],
        below: Sequence[nn.Conv2d | None],
    ):
        super().__init__()
        self.sizes = sizes
        # ModuleList accepts None, though its annotation does not.
        self.right: Any = nn.ModuleList(right)  # pyright: ignore[reportArgumentType]
        self.below: Any = nn.ModuleList(below)  # pyright: ignore[reportArgumentType]

    def narrowed(self, count: int) -> "TiledConv":
        """The same tiles, of the narrowest `count` widths."""
        return TiledConv(self.sizes[:count], self.right[:count], self.below[:count])

    def tiles(self) -> list[nn.Conv2d]:
        return [tile for tile in (*self.right, *self.below) if tile is not None]

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        known = 0
        for (_, inputs), right, below in zip(self.sizes, self.right, self.below, strict=True):
            if right is not None:
                parts = [parts[0] + right(x[:, known:inputs])]
            if below is not None:
                parts.append(below(x if inputs == x.shape[1] else x[:, :inputs]))
                parts = [parts[0] if len(parts) == 1 else torch.cat(parts, 1)]
            known = inputs
        return parts[0]


class TiledSkip(nn.Module):
    """`LongSkip` in tiles; its inputs are two hidden vectors, which are cut separately."""

    def __init__(self, x: TiledConv, skip: TiledConv):
        super().__init__()
        self.x, self.skip = x, skip

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.x(x) + self.skip(skip)


def _cut(conv: nn.Conv2d, rows: slice, columns: slice, bias: bool) -> nn.Conv2d:
    weight = conv.weight[rows, columns]
    size: Any = conv.kernel_size, conv.stride, conv.padding
    outputs, inputs = weight.shape[:2]
    tile = nn.Conv2d(inputs, outputs, *size, bias=bias).requires_grad_(False)
    tile.weight.copy_(weight)
    if bias and tile.bias is not None and conv.bias is not None:
        tile.bias.copy_(conv.bias[rows])
    return tile


def _tiled(
    conv: nn.Conv2d, sizes: Sequence[tuple[int, int]], first: int = 0, bias: bool = True
) -> TiledConv:
    """`conv` in tiles, from its input `first` on."""
    right, below = [], []
    outputs, inputs = 0, 0
    for rows, columns in sizes:
        right.append(None)
        below.append(None)
        if outputs and columns > inputs:
            known = slice(first + inputs, first + columns)
            right[-1] = _cut(conv, slice(0, outputs), known, False)
        if rows > outputs:
            every = slice(first, first + columns)
            below[-1] = _cut(conv, slice(outputs, rows), every, bias and conv.bias is not None)
        outputs, inputs = rows, columns
    return TiledConv(sizes, right, below)


def _nested(narrow: nn.Conv2d, wide: nn.Conv2d, groups: int) -> bool:
    """Whether `narrow` is the corner of `wide`, in each of `groups` equal runs of inputs."""
    rows, columns = narrow.out_channels, narrow.in_channels // groups
    if rows > wide.out_channels or columns > wide.in_channels // groups:
        return False
    parts = zip(narrow.weight.chunk(groups, 1), wide.weight.chunk(groups, 1), strict=True)
    if narrow.bias is not None and wide.bias is not None:
        parts = [*parts, (narrow.bias[:, None], wide.bias[:, None])]
    return all(torch.equal(n, w[:rows, : n.shape[1]]) for n, w in parts)


def share_weights(networks: Sequence[nn.Module]) -> Layers:
    """Replace nested layers of networks of several widths by tiles, in place.

    Args:
        networks: twins of one supernetwork's widths, the widest first; a single one is unchanged.
    """
    found: Layers = {}
    widest = networks[0]
    paths = [path for path, m in widest.named_modules() if isinstance(m, nn.Conv2d)]
    for path in paths:
        convs = [_conv(network, path) for network in networks]
        parent = path.rpartition(".")[0]
        skip = isinstance(widest.get_submodule(parent), LongSkip)
        groups = 2 if skip else 1
        wider = zip(convs[1:], convs, strict=False)
        if len(convs) == 1 or not all(_nested(n, w, groups) for n, w in wider):
            found[path] = convs
            continue
        if convs[0].weight.shape == convs[-1].weight.shape:
            found[path] = convs[:1]
            for network in networks:
                _replace(network, path, convs[0])
            continue
        sizes = [(conv.out_channels, conv.in_channels // groups) for conv in reversed(convs)]
        tiled = [_tiled(convs[0], sizes)]
        if skip:
            half = convs[0].in_channels // 2
            tiled.append(_tiled(convs[0], sizes, half, bias=False))
        found[path] = [tile for part in tiled for tile in part.tiles()]
        for i, network in enumerate(networks):
            parts = [part.narrowed(len(networks) - i) for part in tiled]
            if skip:
                _replace(network, parent, TiledSkip(*parts))
            else:
                _replace(network, path, parts[0])
    return found


def _conv(network: nn.Module, path: str) -> nn.Conv2d:
    found = network.get_submodule(path)
    assert isinstance(found, nn.Conv2d)
    return found


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    # Also for the items of a list, whose names are numbers.
    setattr(network.get_submodule(parent), name, module)
