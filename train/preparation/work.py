"""The work of `train.prepare`: an estimate, the shards, and the description of the result."""

import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import UserError, plural, shown_bytes
from mlx_snapgen.files import lock_folder, unlock_folder, whole_file
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.reading import read_object
from train.data.prepared import save_empty, write_index
from train.data.shards import SETTINGS, cannot_write, shard_path, write_shard
from train.loop.config import changed
from train.preparation.encoders import Chunk, Measured
from train.preparation.pictures import ENLARGED
from train.preparation.report import choose_shown, count_shards, plot_sizes, sheet

LONG_SHARD = 1800
"""Seconds."""
MOST_ENLARGED = 0.1
"""Share of enlarged pictures above which there is a warning."""
SHOWN_REASONS = 3
"""Reasons for skipped pictures in the last line, the most frequent ones."""
RESUME = "run the same command again to resume"


def check_finished(folder: Path, settings: Mapping[str, Any]) -> None:
    """`UserError` if a complete set has other settings than these."""
    if names := _changed(folder, settings):
        raise UserError(
            f"{folder} is a complete set already, with other {' and '.join(names)}: choose "
            "another name"
        )


def _changed(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What messages call the settings that the folder's set has with others."""
    then = read_object(folder / SETTINGS, paths=True)
    now = json.loads(json.dumps(settings))
    if isinstance(then.get("filter"), dict) and "filter" in now:
        then, now = (record | record.pop("filter") for record in (then, now))
    return changed(then, now, now)


class Work(Protocol):
    """Samples in chunks, from pictures or from a teacher."""

    chunk_size: int
    records: int | None
    """Number of records, known after `chunks`."""
    autoencoder: Autoencoder
    """Of the model."""

    def count(self) -> int | None:
        """Number of records; None if it is not known."""
        ...

    def measure(self, chunk: int) -> Measured:
        """Of the first samples, of this chunk if possible."""
        ...

    def chunks(
        self, wanted: Callable[[int], bool], *, start: int, progress: Callable[[int], Any]
    ) -> Iterator[tuple[int, Chunk]]:
        """(number, chunk) of each chunk that is wanted, from chunk `start`.

        Args:
            progress: called with the number of records that were just finished.
        """
        ...

    def pixels(self, keys: Collection[str]) -> dict[str, np.ndarray]:
        """The original pictures of these keys, if there are any."""
        ...


@dataclass
class Preparation:
    """A prepared set in the making.

    Attributes:
        folder: of the set.
        settings: what its bytes depend on, as JSON values.
        index: values for index.json.
        given: what of the command and of the models' files `settings` follow from.
        shard: (I, N): this command does every N-th chunk, from the I-th.
        empty_states: of each text encoder.
    """

    folder: Path
    work: Work
    settings: dict[str, Any]
    index: dict[str, Any]
    given: dict[str, Any]
    shard: tuple[int, int] = (1, 1)
    empty_states: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The hash of the settings, which each shard records."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def run(self, dry_run: bool = False) -> None:
        """Do this command's part; write the index if it was the last one.

        Raises:
            UserError: the folder has something else, the disk is full, or no picture can be used.
        """
        self._check()
        started = time.perf_counter()
        self._print_estimate()
        if dry_run:
            return
        self._claim()
        try:
            self._complete(started)
        finally:
            unlock_folder(self.folder)

    def _complete(self, started: float) -> None:
        self._encode()
        assert self.work.records is not None
        chunks = -(-self.work.records // self.work.chunk_size)
        missing = sum(not shard_path(self.folder, chunk).is_file() for chunk in range(chunks))
        if missing:
            print(
                f"part {self.shard[0]} of {self.shard[1]} is done; {missing} of {chunks} shards "
                "are still to come from the other parts. The last part completes the set; if each "
                "has its own folder, copy their shards/ into one and run any part again there"
            )
            return
        self._describe(chunks, time.perf_counter() - started)

    def _check(self) -> None:
        """`UserError` if the folder has something else than the beginning of this set."""
        path = self.folder / SETTINGS
        if not path.exists():
            if self.folder.exists() and any(p.name[0] != "." for p in self.folder.iterdir()):
                raise UserError(f"{self.folder} exists already: choose another name or delete it")
            return
        if names := _changed(self.folder, self.settings):
            raise UserError(
                f"{self.folder} holds an unfinished set with other {' and '.join(names)}: give "
                "the same options to resume it, or another --output"
            )

    def _claim(self) -> None:
        path = self.folder / SETTINGS
        try:
            with whole_file(path, replace=False) as partial:
                stored = {**self.settings, "given": self.given}
                partial.write_text(json.dumps(stored, indent=1), encoding="utf-8")
        except FileExistsError:
            self._check()  # it is resumed, or another machine was faster
        except OSError as error:
            raise cannot_write(path, error) from None
        # Several machines may do the parts of one set at the same time.
        if not lock_folder(self.folder, shared=self.shard[1] > 1):
            raise UserError(
                f"another process prepares {self.folder}: wait for it, or give another --output"
            )

    def _done(self) -> set[int]:
        """The chunks whose shards exist."""
        paths = shard_path(self.folder, 0).parent.glob("*.safetensors")
        # Others are hidden files, such as "._000001.safetensors" of macOS.
        return {int(path.stem) for path in paths if path.stem.isdecimal()}

    def _records_done(self) -> int:
        """Records of this part's shards that exist, about."""
        part, parts = self.shard
        own = [chunk for chunk in self._done() if chunk % parts == part - 1]
        return len(own) * self.work.chunk_size

    def _records_of_part(self, total: int) -> int:
        """Records of this part's chunks, of a set of `total`; none if it has too few chunks."""
        (part, parts), size = self.shard, self.work.chunk_size
        starts = range((part - 1) * size, total, parts * size)
        return sum(min(size, total - start) for start in starts)

    def _missing(self) -> int:
        """The first chunk of this part whose shard does not exist; the source may be shorter."""
        (part, parts), done = self.shard, self._done()
        return next(chunk for chunk in itertools.count(part - 1, parts) if chunk not in done)

    def _print_estimate(self) -> None:
        with announce("measuring the first pictures ..."):
            measured = self.work.measure(self._missing())
            samples, seconds, each = measured.samples, measured.seconds, measured.nbytes
            total = self.work.count()
        if (long := self.work.chunk_size * seconds) > LONG_SHARD:
            print(
                f"a shard takes up to {_duration(long)}, which are lost if the command is killed: "
                "give a smaller --shard-size",
                file=sys.stderr,
            )
        for column in self.index["captions"]:
            if not any(sample.captions[column] for sample in samples):
                print(
                    f"warning: none of the first {plural(len(samples), 'picture')} has a caption "
                    f"'{column}'",
                    file=sys.stderr,
                )
        rate = f"about {_rate(1 / seconds)} pictures/s, {shown_bytes(each)} each"
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if total is None:
            print(f"unknown number of pictures; {rate}; {shown_bytes(free)} free", flush=True)
            return
        part, parts = self.shard
        done = self._records_done()
        own = self._records_of_part(total)
        left = max(0, own - done)
        these = f" ({own:,} in part {part} of {parts})" if parts > 1 else ""
        print(
            f"{plural(total, 'picture')}{these}; {rate}: {_duration(left * seconds)} and "
            f"{shown_bytes(left * each)} of disk{' for the rest' if done else ''} "
            f"({shown_bytes(free)} free)",
            flush=True,
        )
        if left * each > free:
            print(f"{self.folder}: this disk is too small", file=sys.stderr)

    def _encode(self) -> None:
        part, parts = self.shard[0] - 1, self.shard[1]
        # One shard earlier, which has records: behind the end of a source its length is not known.
        start = max(0, self._missing() - parts)

        def wanted(chunk: int) -> bool:
            return chunk % parts == part and not shard_path(self.folder, chunk).exists()

        total, before = self.work.count(), self._records_done()
        if total is not None:
            total = self._records_of_part(total)
            before = min(before, total)
        with tqdm(
            total=total,
            initial=before,
            unit=" pictures",
            desc="encoding",
        ) as bar:
            try:
                for chunk, content in self.work.chunks(wanted, start=start, progress=bar.update):
                    self._write(chunk, content)
            except KeyboardInterrupt:
                bar.close()
                print(f"{self.folder}: {RESUME}", file=sys.stderr)
                raise

    def _write(self, number: int, chunk: Chunk) -> None:
        write_shard(
            shard_path(self.folder, number),
            chunk.samples,
            held_out=self.settings["held_out"],
            skipped=[asdict(skipped) for skipped in chunk.skipped],
            changed=chunk.changed,
            sizes=chunk.sizes,
            settings=self.digest,
        )

    def _describe(self, chunks: int, seconds: float) -> None:
        """Write what describes the set, and at last its index."""
        folder, buckets = self.folder, [(h, w) for h, w in self.index["buckets"]]
        try:
            counts = count_shards(folder, chunks=chunks, buckets=buckets)
            if not counts.total:
                reason = counts.skipped.most_common(1)[0][0]
                raise UserError(f"no picture can be used ({reason}): see {folder}/skipped.jsonl")
            if counts.sides.any():
                plot_sizes(counts, folder / "sizes.png")
            column = self.index["captions"][0]
            with announce("drawing sheet.png ..."), whole_file(folder / "sheet.png") as partial:
                shown = choose_shown(folder, chunks=chunks, buckets=buckets, column=column)
                originals = self.work.pixels({sample.key for sample in shown})
                sheet(shown, originals, self.work.autoencoder).save(partial, format="png")
            with whole_file(folder / "report.json") as partial:
                report = {**counts.values(), "seconds": round(seconds, 1)}
                partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
        except OSError as error:
            raise cannot_write(folder / "report.json", error) from None
        if self.empty_states:
            save_empty(folder, self.empty_states)
        write_index(folder, chunks=chunks, settings=self.digest, values=self.index)
        if (enlarged := counts.changed[ENLARGED]) > MOST_ENLARGED * counts.total:
            print(
                f"warning: {enlarged:,} of {counts.total:,} pictures are smaller than the "
                f"resolution and were enlarged, which makes them blurred: leave them out with "
                f"--min-side, or prepare them at a lower --resolution",
                file=sys.stderr,
            )
        shown = counts.skipped.most_common(SHOWN_REASONS)
        reasons = [f"; {n:,} skipped: {reason}" for reason, n in shown]
        if more := counts.skipped.total() - sum(n for _, n in shown):
            reasons.append(f"; {more:,} more skipped, see {folder}/skipped.jsonl")
        print(
            f"{folder} is complete: {plural(counts.total, 'picture')}, {shown_bytes(counts.bytes)}"
            + "".join(reasons)
        )


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 120:
        return plural(round(seconds), "second")
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
