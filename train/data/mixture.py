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
from train.data.source import MAY_CHANGE, PromptBatch, Samples, shares_of

AHEAD = 4
THREADS = 2


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
        counts = [source.num_samples for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    @property
    def channels(self) -> int:
        """See `Source`; `UserError` if the sources differ."""
        found = {source.channels for source in self.sources}
        if len(found) > 1:
            raise UserError("some pictures have an alpha channel, others do not: train on one kind")
        return found.pop()

    @property
    def size_shares(self) -> dict[Size, float]:
        """See `Source`."""
        shares: Counter[Size] = Counter()
        for source, weight in zip(self.sources, self.weights, strict=True):
            for size, share in source.size_shares.items():
                shares[size] += weight * share
        return shares_of(shares, shares.values())

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        source, place = self.order(number)
        return self.sources[source].batch(place, count)

    def semantics(self, number: int, count: int, *, factor: int) -> np.ndarray:
        """See `SemanticSource`."""
        source, place = self.order(number)
        return self.sources[source].semantics(place, count, factor=factor)

    def read(self, number: int, count: int) -> Samples:
        """See `Prepared`."""
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
        """See `Source`."""
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
        return getattr(self.source, name)

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """See `PictureSource`."""
        return self._take("batch", number, count=count)

    def read(self, number: int, count: int) -> Samples:
        """See `Prepared`."""
        return self._take("read", number, count=count)

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
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
