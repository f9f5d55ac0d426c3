"""The order of training samples: a function of the seed and the batch's number alone.

Nothing is stored per sample, so the order of a hundred million samples takes no memory, and a
resumed run continues it exactly.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUNDS = 4
MOST_PASSES = 64
"""Passes over the data in an epoch, if some buckets have fewer samples than a batch."""
MIXING_BLOCK = 100
"""Batches in which several sources have their shares."""


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


def fixed_rows(count: int, most: int | None = None) -> np.ndarray:
    """Up to `most` rows of a set of `count`, ascending: the same random ones for every seed.

    The rows for a smaller number are among those for a larger one.
    """
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(Shuffle(count, (0,))(np.arange(most)))


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
        self._ends = np.cumsum(_epoch_batches(counts, batch_size))

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


class LocalOrder:
    """As `BatchOrder`, for data that is read in parts: an epoch has one part after the other.

    The parts come in random order, and so do a part's samples. A batch has samples of one part or
    of parts that follow each other. The batches of all buckets are spread evenly over an epoch.

    Args:
        counts: samples of each bucket in each part, (parts, buckets).
        batch_size: samples of a batch.
        seed: of the order.
    """

    def __init__(self, counts: np.ndarray, *, batch_size: int, seed: int):
        self.counts, self.batch_size, self.seed = counts, batch_size, seed
        self._starts = np.cumsum(counts, axis=0) - counts
        self._batches = _epoch_batches(counts.sum(axis=0).tolist(), batch_size)
        self._slots = functools.lru_cache(maxsize=2)(self._slots_of)

    @property
    def epoch(self) -> int:
        """Batches in an epoch."""
        return sum(self._batches)

    def __call__(self, number: int) -> tuple[int, np.ndarray]:
        """See `BatchOrder`."""
        epoch, slot = divmod(number, self.epoch)
        buckets, places = self._slots(epoch)
        bucket, first = int(buckets[slot]), int(places[slot])
        positions = np.arange(first * self.batch_size, (first + 1) * self.batch_size)
        count = int(self.counts[:, bucket].sum())
        rows = np.empty(self.batch_size, np.int64)
        for turn in np.unique(positions // count):
            here = positions // count == turn
            seed = (self.seed, epoch, int(turn))
            rows[here] = self._rows(bucket, positions[here] % count, seed=seed)
        return bucket, rows

    def _slots_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket of each batch of an epoch, and its number among those of the bucket."""
        rng = np.random.default_rng((self.seed, epoch))
        times = [(np.arange(n) + rng.random(n)) / n for n in self._batches if n]
        order = np.argsort(np.concatenate(times), kind="stable")
        buckets = np.repeat(np.arange(len(self._batches)), self._batches)
        places = np.concatenate([np.arange(n) for n in self._batches])
        return buckets[order].astype(np.int32), places[order].astype(np.int32)

    def _rows(self, bucket: int, positions: np.ndarray, *, seed: tuple[int, ...]) -> np.ndarray:
        """Rows in a bucket of positions in one pass over it."""
        order = np.random.default_rng(seed).permutation(len(self.counts))
        counts = self.counts[order, bucket]
        ends = np.cumsum(counts)
        parts = np.searchsorted(ends, positions, side="right")
        rows = np.empty(len(positions), np.int64)
        for k in np.unique(parts):
            part, here = int(order[k]), parts == k
            shuffle = Shuffle(int(counts[k]), (*seed, bucket, part))
            within = positions[here] - (ends[k] - counts[k])
            rows[here] = self._starts[part, bucket] + shuffle(within)
        return rows


def _epoch_batches(counts: Sequence[int], batch_size: int) -> list[int]:
    """Batches of each bucket in an epoch."""
    present = [count for count in counts if count]
    passes = min(MOST_PASSES, max(1, -(-batch_size // min(present))))
    return [max(1, passes * n // batch_size) if n else 0 for n in counts]


class MixtureOrder:
    """Which of several sources a batch comes from.

    Every `MIXING_BLOCK` batches have the exact shares, up to a rounding that is made up for later.

    Args:
        weights: of the sources, above 0; shares of the batches.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], *, seed: int):
        exact = [Fraction(weight) for weight in weights]
        # Of the batches that the sources before leave.
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]
        self.seed = seed

    def __call__(self, number: int) -> tuple[int, int]:
        """Source of batch `number`, and the number of the batch in that source."""
        block, place = divmod(number, MIXING_BLOCK)
        begin = self._counts(block * MIXING_BLOCK)
        quotas = self._counts((block + 1) * MIXING_BLOCK) - begin
        sources = np.repeat(np.arange(len(quotas)), quotas)
        order = np.random.default_rng((self.seed, block)).permutation(sources)
        source = int(order[place])
        before = int((order[:place] == source).sum())
        return source, int(begin[source]) + before

    def _counts(self, total: int) -> np.ndarray:
        """Batches of each source among the first `total`; none ever gets less with more."""
        counts = []
        for share in self._shares:
            counts.append(math.floor(total * share + Fraction(1, 2)))
            total -= counts[-1]
        return np.array(counts)
