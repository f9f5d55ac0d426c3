"""The Efficient DiT cut between two blocks, for phones that do not load it in one piece."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convert.pytorch.attention import Grid
from convert.pytorch.efficient_dit import EfficientDiT
from convert.pytorch.layers import text_bias, tokens
from mlx_snapgen.errors import UserError

Values = dict[str, Tensor]


class Step(NamedTuple):
    """A piece of the network that is not cut. Values go by name."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., Any]
    modules: tuple[nn.Module, ...]
    block: bool = False
    """Whether the network may be cut before it."""


INPUTS = ("x_t", "t", "text", "mask")


def steps_of(network: EfficientDiT) -> list[Step]:
    """`EfficientDiT.forward` as steps, from `INPUTS` to "velocity"."""
    grid, cells = network.grid, network.cells
    count, skips = network.config.blocks[1], network.config.long_skips
    steps: list[Step] = []

    def start(x_t: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = tokens(network.patch_embed(x_t))
        return x, *network.time(t), text_bias(mask).to(x.dtype)

    def add(run: Callable, reads: tuple[str, ...], module: nn.Module, writes: str = "x") -> None:
        # The hidden state goes by the name that the step before gave it.
        reads = (steps[-1].writes[0], *reads)
        steps.append(Step(reads, (writes,), lambda *values: (run(*values),), (module,)))

    def add_block(block: nn.Module, *grids: Grid, writes: str = "x") -> None:
        def run(x: Tensor, modulation: Tensor, text: Tensor, bias: Tensor) -> Tensor:
            return block(x, modulation, text, bias, *grids)

        add(run, ("modulation", "text", "bias"), block, writes)
        steps[-1] = steps[-1]._replace(block=True)

    made = ("x", "embedding", "modulation", "bias")
    modules = (network.patch_embed, network.time)
    steps.append(Step(("x_t", "t", "mask"), made, start, modules))
    for i, block in enumerate(network.down_blocks):
        last = count and i == len(network.down_blocks) - 1
        add_block(block, grid, cells, writes="skip" if last else "x")
    if count:
        add(lambda x: network.downsample(x, grid), (), network.downsample)
        for i, block in enumerate(network.middle_blocks):
            mirrored = count - 1 - i
            if skips and mirrored < i:
                long_skip = network.long_skips[i - (count + 1) // 2]
                add(long_skip, (f"middle_{mirrored}",), long_skip)
            add_block(block, cells, writes=f"middle_{i}" if skips and mirrored > i else "x")
        upsample = network.upsample
        add(lambda x, skip: upsample(x, skip, cells), ("skip",), upsample)
        for block in network.up_blocks:
            add_block(block, grid, cells)
    head = network.head
    add(lambda x, embedding: head(x, embedding, grid), ("embedding",), head, "velocity")
    return steps


class Chunk(nn.Module):
    """Steps first to end of a network, from values that came before to those used after.

    `inputs` and `outputs` name them, in the order of `forward`.
    """

    def __init__(self, steps: list[Step], first: int, end: int):
        super().__init__()
        self.steps = steps[first:end]
        self.modules_of_steps = nn.ModuleList(m for step in self.steps for m in step.modules)
        made: dict[str, None] = {}
        read: dict[str, None] = {}
        for step in self.steps:
            read |= {name: None for name in step.reads if name not in made}
            made |= dict.fromkeys(step.writes)
        later = {name for step in steps[end:] for name in step.reads}
        self.inputs = tuple(read)
        self.outputs = tuple(n for n in made if n in later or n == "velocity")

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        known = dict(zip(self.inputs, values, strict=True))
        for step in self.steps:
            made = step.run(*(known[name] for name in step.reads))
            known |= zip(step.writes, made, strict=True)
        return tuple(known[name] for name in self.outputs)


def cut_points(network: EfficientDiT, chunks: int) -> list[int]:
    """Ends of `chunks` runs of steps with about as many weights each, each cut before a block.

    Raises:
        UserError: the network has fewer blocks.
    """
    steps = steps_of(network)
    sizes = [sum(p.numel() for m in s.modules for p in m.parameters()) for s in steps]
    before = [sum(sizes[:i]) for i in range(len(steps) + 1)]
    places = [i for i, step in enumerate(steps) if step.block][1:]
    if not 1 <= chunks <= len(places) + 1:
        raise UserError(f"a network of {len(places) + 1} blocks does not give {chunks} chunks")
    ends: list[int] = []
    for k in range(1, chunks):
        free = [p for p in places if p > (ends[-1] if ends else 0)]
        free = free[: len(free) - (chunks - 1 - k)]
        ends.append(min(free, key=lambda p: abs(before[p] - before[-1] * k / chunks)))
    return [*ends, len(steps)]


def cut(network: EfficientDiT, ends: list[int]) -> list[Chunk]:
    """`network` as chunks that share its layers."""
    steps = steps_of(network)
    starts = [0, *ends[:-1]]
    return [Chunk(steps, first, end) for first, end in zip(starts, ends, strict=True)]


def example_values(chunks: list[Chunk], inputs: Values) -> list[Values]:
    """Inputs of each chunk, computed from those of the network."""
    values, found = dict(inputs), []
    for chunk in chunks:
        found.append({name: values[name] for name in chunk.inputs})
        with torch.no_grad():
            values |= zip(chunk.outputs, chunk(*found[-1].values()), strict=True)
    return found
