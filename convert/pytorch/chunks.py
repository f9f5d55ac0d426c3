"""The Efficient DiT cut between two blocks, for phones that do not load it in one piece."""

import torch
from torch import Tensor, nn

from convert.pytorch.efficient_dit import EfficientDiT, Step
from mlx_snapgen.errors import UserError

Values = dict[str, Tensor]


class Chunk(nn.Module):
    """Steps `first` to `end` of a network (see `EfficientDiT.steps`).

    `inputs` names the values that it reads from earlier chunks, `outputs` those that later chunks
    read, both in the order of `forward`.
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
            known |= step(known)
        return tuple(known[name] for name in self.outputs)


def cut_points(network: EfficientDiT, chunks: int) -> list[int]:
    """The last step of each of `chunks` chunks of similar size, each cut before a block.

    Raises:
        UserError: the network has fewer blocks.
    """
    steps = network.steps()
    sizes = [sum(p.numel() for m in s.modules for p in m.parameters()) for s in steps]
    before = [sum(sizes[:i]) for i in range(len(steps) + 1)]
    places = [i for i, step in enumerate(steps) if step.is_block][1:]
    if not 1 <= chunks <= len(places) + 1:
        raise UserError(f"a network of {len(places) + 1} blocks cannot be cut into {chunks} chunks")
    ends: list[int] = []
    for k in range(1, chunks):
        free = [p for p in places if p > (ends[-1] if ends else 0)]
        free = free[: len(free) - (chunks - 1 - k)]
        ends.append(min(free, key=lambda p: abs(before[p] - before[-1] * k / chunks)))
    return [*ends, len(steps)]


def cut(network: EfficientDiT, ends: list[int]) -> list[Chunk]:
    """`network` as chunks that share its layers."""
    steps = network.steps()
    starts = [0, *ends[:-1]]
    return [Chunk(steps, first, end) for first, end in zip(starts, ends, strict=True)]


def example_values(chunks: list[Chunk], inputs: Values) -> list[Values]:
    """Example inputs of each chunk, computed from those of the network."""
    values, found = dict(inputs), []
    for chunk in chunks:
        found.append({name: values[name] for name in chunk.inputs})
        with torch.no_grad():
            values |= zip(chunk.outputs, chunk(*found[-1].values()), strict=True)
    return found
