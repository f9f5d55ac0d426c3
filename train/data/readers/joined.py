"""Several sets one after the other."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from train.data.source import Record, RecordSource, Skipped


class JoinedRecords:
    """Sets of records one after the other: a `RecordSource`. Keys are "NUMBER:KEY"."""

    def __init__(self, sources: Sequence[RecordSource]):
        self.sources = list(sources)

    def count(self) -> int | None:
        """See `RecordSource`."""
        counts = [source.count() for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def records(self, start: int = 0) -> Iterator[Record | Skipped]:
        """See `RecordSource`."""
        for number, source in enumerate(self.sources):
            count = source.count() if start else None
            if count is not None:
                skipped = min(start, count)
                records = source.records(skipped) if skipped < count else iter(())
                start -= skipped
            else:
                records = source.records()
            for record in records:
                if start:
                    start -= 1
                else:
                    yield self._own(number, record)

    def at(self, place: Sequence[Any], *, captions_only: bool = False) -> Record | Skipped:
        """See `RecordSource`."""
        source = self.sources[place[0]]
        return self._own(place[0], source.at(place[1:], captions_only=captions_only))

    def group(self, place: Sequence[Any]) -> int:
        """See `RecordSource`."""
        return self.sources[place[0]].group(place[1:])

    def fingerprint(self, *, times: bool = True) -> str:
        """See `RecordSource`."""
        return " ".join(source.fingerprint(times=times) for source in self.sources)

    def settings(self) -> dict[str, Any]:
        """See `RecordSource`."""
        parts = [source.settings() for source in self.sources]
        paths = [[p["path"]] if isinstance(p["path"], str) else p["path"] for p in parts]
        return {"data": "joined", "path": list(itertools.chain(*paths)), "sources": parts}

    def _own(self, number: int, record: Record | Skipped) -> Record | Skipped:
        key = f"{number}:{record.key}"
        if isinstance(record, Record):
            return replace(record, key=key, place=(number, *record.place))
        return replace(record, key=key)
