"""What tests share: words, random weights, and the memory of a process."""

import os
import re
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

NOUNS = ["apple", "car", "cat", "ice cream cone"]
COLOURS = ["red", "blue", "green"]
VOCAB_SIZE = 64


def randomise(module, seed: int) -> None:
    """Normal weights everywhere, so that layers that start at zero take part."""
    flat = tree_flatten(module.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    values = []
    for key, (name, p) in zip(keys, flat, strict=True):
        if p.ndim == 1 and re.search(r"norm\d?(\.members\.\d)?\.weight", name):
            value = 1 + 0.1 * mx.random.normal(p.shape, key=key)
        else:
            scale = 0.1 if p.ndim == 1 else (p.size // p.shape[0]) ** -0.5
            value = scale * mx.random.normal(p.shape, key=key)
        values.append((name, value))
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())


def memory(pid):
    """MiB of a process and its children; Linux alone tells."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
