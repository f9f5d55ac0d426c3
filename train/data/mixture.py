"""Several sources with weights, and batches that are read ahead."""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.picture_files import Size
from train.data.order import MixtureOrder
from train.data.source import MAY_CHANGE, PromptBatch, Samples

AHEAD = 4
THREADS = 2


def num_samples(source: Any) -> int | None:
    """Number of pictures of a source; None if it has no end."""
    if isinstance(source, Prefetched):
        return num_samples(source.source)
    return len(source) if hasattr(source, "__len__") else getattr(source, "num_samples", None)


def sizes_in(source: Any) -> dict[Size, float]:
    """Sizes of the pictures of a source -> their share of the batches, the most frequent first.

    Empty if the pictures have one size that the source does not name.
    """
    shares: Counter[Size] = Counter()
    parts = getattr(source, "sources", [source])
    for part, weight in zip(parts, getattr(source, "weights", [1.0]), strict=True):
        counts = getattr(part, "counts", None) or [len(rows) for rows in getattr(part, "rows", ())]
        for size, count in zip(getattr(part, "sizes", ()), counts, strict=True):
            shares[size] += weight * count / sum(counts)
    return {size: share for size, share in shares.most_common() if share}


def channels_in(source: Any) -> int:
    """Channels of a source's pictures: 4 with alpha; `UserError` if they differ."""
    found = {getattr(part, "channels", 3) for part in getattr(source, "sources", [source])}
    if len(found) > 1:
        raise UserError("some pictures have an alpha channel, others do not: train on one kind")
    return found.pop()


class Mixture:
    """Several sources of one kind, a batch from one of them: a source of that kind.

    Args:
        sources: all `PictureSource`s or all `LatentSource`s.
        weights: their shares of the batches.
        seed: of the order.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], *, seed: int):
        self.sources, self.weights, self.seed = list(sources), list(weights), seed
        self.order = MixtureOrder(weights, seed=seed)

    @property
    def num_samples(self) -> int | None:
        """Number of pictures; None if a source has no end."""
        counts = [num_samples(source) for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        source, place = self.order(number)
        return self.sources[source].batch(place, count)

    def read(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        source, place = self.order(number)
        return self.sources[source].read(place, count)

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        source, place = self.order(number)
        return self.sources[source].samples(place, count)

    def prompt_batch(self, number: int, count: int) -> PromptBatch:
        """See `Prepared`."""
        source, place = self.order(number)
        return self.sources[source].prompt_batch(place, count)

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`."""
        source, place = self.order(number)
        return self.sources[source].prompts(place, count)

    def validation(self) -> "Mixture | None":
        """The parts for validation, with the weights of their sources; None if there are none."""
        parts = [source.validation() for source in self.sources]
        pairs = [(p, w) for p, w in zip(parts, self.weights, strict=True) if p is not None]
        if not pairs:
            return None
        return Mixture([p for p, _ in pairs], [w for _, w in pairs], seed=self.seed)

    def settings(self) -> dict[str, Any]:
        """See `PictureSource`."""
        parts = [source.settings() for source in self.sources]
        return {
            "data": "mixture",
            "sources": [{k: v for k, v in p.items() if k not in MAY_CHANGE} for p in parts],
            "weights": self.weights,
            "seed": self.seed,
            "where": [{k: v for k, v in p.items() if k in MAY_CHANGE} for p in parts],
        }


class Prefetched:
    """A source whose next batches are read in background threads; the batches do not change.

    After a batch, the threads read the batches that follow at the same distance. An error in a
    batch is raised when the caller requests that batch. The threads end with `close`, or with the
    object.

    Args:
        source: its `batch` or `read` may run in any thread.
        ahead: batches read in advance, and held in memory.
        threads: that read.
    """

    def __init__(self, source: Any, *, ahead: int = AHEAD, threads: int = THREADS):
        self.source, self.ahead = source, ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read ahead")
        self._waiting: dict[tuple[str, int, int], Future[Any]] = {}
        self._last, self._stride = -1, 1
        end = functools.partial(self._pool.shutdown, wait=False, cancel_futures=True)
        self.close: Callable[[], Any] = weakref.finalize(self, end)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `len` would find none on this class
            raise AttributeError(name)
        return getattr(self.source, name)

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        return self._take("batch", number, count=count)

    def read(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        return self._take("read", number, count=count)

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        if not hasattr(self.source, "read"):
            return self.source.samples(number, count)
        return self._take("read", number, count=count).to_mlx()

    def _take(self, method: str, number: int, *, count: int) -> Any:
        if number > self._last >= 0:
            self._stride = number - self._last
        self._last = number
        read = getattr(self.source, method)
        wanted = range(number, number + (self.ahead + 1) * self._stride, self._stride)
        keys = [(method, k, count) for k in wanted]
        for key in set(self._waiting) - set(keys):
            self._waiting.pop(key).cancel()
        for key in keys:
            if key not in self._waiting:
                self._waiting[key] = self._pool.submit(read, key[1], count)
        return self._waiting.pop(keys[0]).result()
