"""The order of training samples: a function of the seed and the batch's number alone.

Nothing is stored per sample, so the order of a hundred million samples takes no memory, and a
resumed run continues it exactly.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 4
MOST_PASSES = 64
"""Passes over the data in an epoch, if some buckets have fewer samples than a batch."""
MIXING_BLOCK = 100
"""Batches in which several sources have their exact shares."""


class Shuffle:
    """A pseudo-random permutation of range(count), computed for each index.

    A Feistel network over the next power of four, applied again to results beyond `count` (cycle
    walking; Black and Rogaway 2002).

    Args:
        count: up to 2**62.
        seed: whole numbers; another seed gives another permutation.
    """

    def __init__(self, count: int, seed: Sequence[int]):
        self.count = count
        half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)
        self._keys = np.random.default_rng(tuple(seed)).integers(2**63, size=ROUNDS).astype("u8")

    def __call__(self, index: np.ndarray | int) -> np.ndarray:
        """Indices in range(count) -> where the permutation puts them, int64."""
        x = np.atleast_1d(np.asarray(index)).astype("u8")
        x = self._permute(x)
        while (outside := x >= self.count).any():
            x[outside] = self._permute(x[outside])
        return x.astype(np.int64)

    def _permute(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right, key) & self._mask)
        return (left << self._half) | right


def _mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The mixing steps of splitmix64."""
    with np.errstate(over="ignore"):
        x = (x + key) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class BatchOrder:
    """Which samples a batch has. All samples of a batch are of one bucket, that is of one size.

    In an epoch each bucket has batches in proportion to its samples, in random order. An epoch is
    one pass over the data, or several if a bucket has fewer samples than a batch. Samples of a
    bucket that fill no batch are left out of an epoch, other ones in each.

    Args:
        counts: samples of each bucket.
        batch_size: samples of a batch.
        seed: of the order.
    """

    def __init__(self, counts: Sequence[int], *, batch_size: int, seed: int):
        self.counts, self.batch_size, self.seed = list(counts), batch_size, seed
        present = [count for count in counts if count]
        passes = min(MOST_PASSES, max(1, -(-batch_size // min(present))))
        batches = [max(1, passes * n // batch_size) if n else 0 for n in counts]
        self._ends = np.cumsum(batches)

    @property
    def epoch(self) -> int:
        """Batches in an epoch."""
        return int(self._ends[-1])

    def __call__(self, number: int) -> tuple[int, np.ndarray]:
        """Bucket of batch `number`, and the rows (batch_size,) of its samples there."""
        epoch, slot = divmod(number, self.epoch)
        slot = int(Shuffle(self.epoch, (self.seed, epoch))(slot)[0])
        bucket = int(np.searchsorted(self._ends, slot, side="right"))
        first = slot - (int(self._ends[bucket - 1]) if bucket else 0)
        positions = np.arange(first * self.batch_size, (first + 1) * self.batch_size)
        count = self.counts[bucket]
        rows = np.empty(self.batch_size, np.int64)
        for turn in np.unique(positions // count):
            here = positions // count == turn
            shuffle = Shuffle(count, (self.seed, epoch, int(turn), bucket))
            rows[here] = shuffle(positions[here] % count)
        return bucket, rows


class MixtureOrder:
    """Which of several sources a batch comes from.

    Args:
        weights: of the sources, above 0; shares of the batches, rounded to 1/100.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], *, seed: int):
        exact = np.array(weights, np.float64) / np.sum(weights) * MIXING_BLOCK
        self.quotas = np.maximum(1, np.round(exact)).astype(int)
        self.seed = seed

    def __call__(self, number: int) -> tuple[int, int]:
        """Source of batch `number`, and the number of the batch in that source."""
        block, place = divmod(number, int(self.quotas.sum()))
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        order = np.random.default_rng((self.seed, block)).permutation(sources)
        source = int(order[place])
        before = int((order[:place] == source).sum())
        return source, block * int(self.quotas[source]) + before
