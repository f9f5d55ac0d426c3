"""Prepared data: encoded pictures with captions on disk, as `train.prepare` writes them.

index.json                   resolution, autoencoders, caption columns, samples of each shard
shards/000000.safetensors    the samples of one chunk of consecutive records
empty.safetensors            optional: the empty prompt's text states
settings.json                of `train.prepare`, to resume it
report.json, sizes.png, sheet.png, skipped.jsonl
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.module import check_version
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.files import expanded, whole_file
from mlx_snapgen.json_values import to_dict
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.picture_files import Size
from mlx_snapgen.reading import read_bytes, read_object
from train.data.order import BatchOrder, fixed_rows
from train.data.selection import choose_column, fixed_draw
from train.data.shards import (
    INDEX,
    SETTINGS,
    SHARDS,
    TRAIN,
    VALIDATION,
    Shard,
    cannot_write,
    group_name,
    save_arrays,
    shard_path,
)
from train.data.source import TEACHER, PromptBatch, Samples, Source, shares_of
from train.data.streams import Stream

FORMAT_VERSION = 1
EMPTY = "empty.safetensors"
MODEL = "model"
"""Name of the model's own autoencoder."""
EMPTY_PART = {
    TRAIN: "has no pictures for training: prepare them with a lower --held-out",
    VALIDATION: "has no pictures for validation",
}
OPEN_SHARDS = 64
"""Shards that are open at the same time; macOS allows 256 open files by default."""


def save_empty(folder: Path, states: Mapping[str, np.ndarray]) -> None:
    """Write the empty prompt's states (L, D) of each text encoder; `UserError` as `write_shard`."""
    try:
        with whole_file(folder / EMPTY) as partial:
            save_arrays(partial, {name: [value] for name, value in states.items()}, metadata={})
    except OSError as error:
        raise cannot_write(folder / EMPTY, error) from None


def write_index(folder: Path, *, chunks: int, settings: str, values: Mapping[str, Any]) -> None:
    """Write index.json of a complete set: after that, it can be trained on.

    Args:
        chunks: number of shards.
        settings: as in `write_shard`.
        values: "resolution", "autoencoders", "captions", "text_states" and "buckets".

    Raises:
        UserError: a shard is missing, damaged, or has other settings.
    """
    shards = []
    for chunk in range(chunks):
        path = shard_path(folder, chunk)
        with Shard(path) as shard:
            if shard.metadata.get("settings") != settings:
                raise UserError(f"{path} belongs to another set: delete it to encode it again")
            counts = {
                part: [shard.count(group_name(part, (h, w))) for h, w in values["buckets"]]
                for part in (TRAIN, VALIDATION)
            }
        file = str(path.relative_to(folder))
        shards.append({"file": file, "counts": counts[TRAIN], "validation": counts[VALIDATION]})
    # The hash of the settings is there so that runs notice other pictures.
    index = {"format_version": FORMAT_VERSION, "settings": settings, **values, "shards": shards}
    try:
        with whole_file(folder / INDEX) as partial:
            partial.write_text(json.dumps(index), encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder / INDEX, error) from None


def describe_autoencoder(autoencoder: Autoencoder) -> dict[str, Any]:
    """Config of an autoencoder, and a hash of what its latents depend on."""
    config = to_dict(autoencoder.config)
    state = hashlib.blake2b(digest_size=16)
    kept = {name: config[name] for name in ("kind", "latent_channels")}
    for name in ("latents_mean", "latents_std"):
        kept[name] = [float(np.float32(x)) for x in config[name]]
    parts = flat_parameters(autoencoder.encoder)
    if config.get("semantics"):
        kept["semantics"] = config["semantics"]
        parts["decoder.table.empty"] = autoencoder.decoder.table.empty
    state.update(json.dumps(kept, sort_keys=True).encode())
    for name, value in sorted(parts.items()):
        state.update(f"{name}{tuple(value.shape)}".encode())
        state.update(np.array(value.astype(mx.float32)).data)
    return {"config": config, "digest": state.hexdigest()}


# --- reading ------------------------------------------------------------------------------------


class Prepared(Source):
    """A prepared set: a `LatentSource`.

    Only index.json is read at the start; memory is a few bytes for each shard.

    Args:
        folder: that `train.prepare` wrote.
        captions: column -> weight, above 0; each picture of a batch gets the caption of a random
            column among those where it has one. None: the first column.
        seed: of the order and of the choice of captions.
        part: "train" or "validation".

    Attributes:
        resolution: as given to `train.prepare`, in pixels.
        columns: the caption columns of the set.
        sizes: (height, width) in pixels of each bucket.
        counts: samples of each bucket.
        text_states: name of a text encoder -> its config, for which the set has states.
        autoencoders: "model", or name in `Samples.other_latents` -> {"config", "digest"}.
        wanted: names of the autoencoders and text encoders whose latents and states are read;
            those of a teacher are not until "teacher" is added.

    Raises:
        UserError: no prepared set, an unfinished or damaged one, or an unknown column.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        captions: Mapping[str, float] | None = None,
        seed: int = 0,
        part: str = TRAIN,
    ):
        self.folder, self.seed, self.part = expanded(folder), seed, part
        index, self.digest = _read_index(self.folder)
        try:
            _check_index(index)
            self.resolution: int = index["resolution"]
            self.columns: list[str] = index["captions"]
            self.sizes: list[Size] = [(height, width) for height, width in index["buckets"]]
            self.text_states: dict[str, Any] = index["text_states"]
            self.autoencoders: dict[str, Any] = index["autoencoders"]
            self._files: list[str] = [shard["file"] for shard in index["shards"]]
            key = "counts" if part == TRAIN else "validation"
            counts = np.array([shard[key] for shard in index["shards"]], np.int64)
            self._counts = counts.reshape(len(self._files), len(self.sizes))
            self._settings: str | None = index.get("settings")
        except (LookupError, TypeError, ValueError, OverflowError):
            path = self.folder / INDEX
            raise UserError(f"{path} is damaged: delete it, and run train.prepare again") from None
        # Row of a bucket at which each shard ends.
        self._ends = np.cumsum(self._counts, 0).T.copy()
        self.counts: list[int] = self._counts.sum(0).tolist()
        self.captions = self._weights(captions)
        self.wanted: set[str] = {*self.autoencoders, *self.text_states} - {TEACHER}
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def _weights(self, captions: Mapping[str, float] | None) -> dict[str, float]:
        for column in captions or {}:
            if column not in self.columns:
                raise UserError(
                    f"{self.folder} has no caption column '{column}'"
                    f"{nearest(column, self.columns)}, only {', '.join(self.columns)}: prepare "
                    f"the pictures with --captions {column}"
                )
        return dict(captions or {self.columns[0]: 1.0})

    def validation(self) -> "Prepared | None":
        """The held-out part; None if it is empty."""
        part = Prepared(self.folder, captions=self.captions, seed=self.seed, part=VALIDATION)
        return part if part.num_samples else None

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "data": "prepared",
            "index": self.digest,
            "captions": self.captions,
            "seed": self.seed,
            "where": {"path": str(self.folder)},
        }

    @property
    def num_samples(self) -> int:
        """Number of samples of this part."""
        return sum(self.counts)

    @property
    def size_shares(self) -> dict[Size, float]:
        """See `Source`."""
        return shares_of(self.sizes, self.counts)

    @property
    def empty_states(self) -> dict[str, np.ndarray]:
        """The empty prompt's states (L, D) of each encoder that has them; empty if none has."""
        path = self.folder / EMPTY
        if not path.is_file():
            return {}
        with Shard(path) as shard:
            return {name: shard.rows(name) for name in self.text_states}

    # --- checks ---

    def check_autoencoder(self, autoencoder: Autoencoder, *, teacher: str | None = None) -> None:
        """`UserError` unless the latents are those of this autoencoder.

        Args:
            teacher: whose autoencoder it is, as the user gave it; None for the model's own.
        """
        found = self.autoencoders.get(MODEL if teacher is None else TEACHER)
        again = f"prepare the pictures with --teacher {teacher}"
        if found is None:
            raise UserError(f"{self.folder} has no latents of the teacher: {again}")
        if found["digest"] == describe_autoencoder(autoencoder)["digest"]:
            return
        if teacher is None:
            again = (
                "prepare the pictures with --model and this model, or make a model with train.new "
                "and --autoencoder MODEL, the model that the set was prepared for"
            )
        raise UserError(
            f"{self.folder} has latents of another {'autoencoder' if teacher is None else TEACHER} "
            f"({found['config'].get('kind')}, {found['config'].get('latent_channels')} channels): "
            f"{again}"
        )

    def check_text_states(self, configs: Sequence[TextEncoderConfig]) -> None:
        """`UserError` if text states are those of other text encoders than the model's."""
        known = {f"text_encoder_{i}": to_dict(config) for i, config in enumerate(configs)}
        for name, found in self.text_states.items():
            if name.startswith("text_encoder_") and known.get(name) != found:
                raise UserError(
                    f"{self.folder} has text states of a {found.get('kind')} text encoder that "
                    "this model does not have: prepare the pictures with --model and this model"
                )

    def check_files(self) -> None:
        """`UserError` if a shard is missing."""
        for file in self._files:
            if not expanded(self.folder / file).is_file():
                raise UserError(
                    f"{self.folder} is incomplete, {file} is missing: run train.prepare again"
                )

    # --- samples ---

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`; float32 latents. Errors are those of `read`."""
        return self.read(number, count).to_mlx()

    def read(self, number: int, count: int) -> Samples:
        """`samples` with numpy arrays, from any thread, without MLX.

        Raises:
            UserError: the part is empty, or a shard is missing or damaged.
        """
        bucket, rows = self.order(count)(number)
        return self._read(bucket, rows, draws=self._draws(number, count))

    def prompt_batch(self, number: int, count: int) -> PromptBatch:
        """The captions of `read`, with their text states; no latents are read."""
        bucket, rows = self.order(count)(number)
        captions, states, _ = self._arrays(bucket, rows, self._draws(number, count), latents=())
        return PromptBatch(captions, self.sizes[bucket], states)

    def _draws(self, number: int, count: int) -> list[float]:
        """What chooses the captions of a batch."""
        return Stream.CAPTIONS.generator(self.seed, number).random(count).tolist()

    def order(self, count: int) -> BatchOrder:
        """The order of batches of `count` samples; `UserError` if the part is empty."""
        self.check_not_empty()
        return BatchOrder(self.counts, batch_size=count, seed=self.seed)

    def prompts(self, number: int, count: int) -> list[str]:
        """See `PromptSource`: captions, in an order of their own."""
        order = BatchOrder([self.check_not_empty()], batch_size=count, seed=self.seed)
        rows = order(number)[1]
        ends = np.cumsum(self.counts)
        buckets = np.searchsorted(ends, rows, side="right")
        draws = self._draws(number, count)
        found = []
        for bucket, row, draw in zip(buckets.tolist(), rows.tolist(), draws, strict=True):
            row -= int(ends[bucket - 1]) if bucket else 0
            shard, row, group = self._place(bucket, row)
            found.append(self._caption(shard, row, group=group, draw=draw)[1])
        return found

    def batches(self, count: int, *, most: int | None = None) -> Iterator[Samples]:
        """Each sample once: at most `count` of one bucket at a time.

        Samples and captions are the same for every seed.

        Args:
            most: limit of the samples; they are chosen at random. None: all, in their order.
        """
        ends = np.cumsum(self.counts)
        places = fixed_rows(self.num_samples, most)
        for bucket, total in enumerate(self.counts):
            first = int(ends[bucket]) - total
            rows = places[(places >= first) & (places < ends[bucket])] - first
            for start in range(0, len(rows), count):
                yield self._read(bucket, rows[start : start + count]).to_mlx()

    def check_not_empty(self) -> int:
        """The number of samples; `UserError` if this part has none."""
        if not self.num_samples:
            raise UserError(f"{self.folder} {EMPTY_PART[self.part]}")
        return self.num_samples

    def _read(
        self, bucket: int, rows: np.ndarray, *, draws: Sequence[float] | None = None
    ) -> Samples:
        names = [name for name in self.autoencoders if name in self.wanted]
        captions, states, latents = self._arrays(bucket, rows, draws, latents=names)
        joined = {k: np.concatenate(found).astype(np.float32) for k, found in latents.items()}
        own: Any = joined.pop(MODEL)
        others: Any = joined
        return Samples(own, captions, states=states, other_latents=others)

    def _arrays(
        self,
        bucket: int,
        rows: np.ndarray,
        draws: Sequence[float] | None,
        *,
        latents: Sequence[str],
    ) -> tuple[list[str], dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
        """Captions, states and latents of some rows.

        Args:
            draws: choose the captions; None: each one's key does.
            latents: names of the autoencoders.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in latents}
        states: dict[str, list[np.ndarray]] = {n: [] for n in self.text_states if n in self.wanted}
        captions = []
        for k, row in enumerate(rows.tolist()):
            shard, row, group = self._place(bucket, row)
            for name, arrays in found.items():
                array = f"{group}/latents" + (f"/{name}" if name != MODEL else "")
                arrays.append(shard.rows(array, row, row + 1))
            draw = draws[k] if draws else fixed_draw(shard.text(f"{group}/keys", row))
            column, caption = self._caption(shard, row, group=group, draw=draw)
            captions.append(caption)
            for name, arrays in states.items():
                arrays.append(shard.row(f"{group}/states/{name}/{column}", row))
        return captions, states, found

    def _place(self, bucket: int, row: int) -> tuple[Shard, int, str]:
        """Shard of a bucket's row, its row there, and the start of its arrays' names."""
        ends = self._ends[bucket]
        i = int(np.searchsorted(ends, row, side="right"))
        before = int(ends[i - 1]) if i else 0
        return self._shard(i), row - before, group_name(self.part, self.sizes[bucket])

    def _caption(self, shard: Shard, row: int, *, group: str, draw: float) -> tuple[str, str]:
        """Column and text of a sample's caption."""
        texts = {c: shard.text(f"{group}/captions/{c}", row) for c in self.captions}
        column = choose_column(texts, self.captions, draw=draw)
        return column, texts[column]

    def _shard(self, i: int) -> Shard:
        with self._lock:
            if i not in self._open:
                self._open[i] = self._open_shard(i)
            self._open.move_to_end(i)
            while len(self._open) > OPEN_SHARDS:
                # It is closed when no other thread reads it any more.
                self._open.popitem(last=False)
            return self._open[i]

    def _open_shard(self, i: int) -> Shard:
        """A shard; `UserError` if it is one of another set, or not the one that was indexed."""
        shard = Shard(self.folder / self._files[i])
        found = [shard.count(group_name(self.part, size)) for size in self.sizes]
        others = self._settings not in (None, shard.metadata.get("settings"))
        if others or found != self._counts[i].tolist():
            raise UserError(
                f"{shard.path} belongs to another set, or has another position in this set: "
                "delete it, and run train.prepare again"
            )
        return shard


def prepared_parts(source: Source) -> list[Prepared]:
    """The folders of `train.prepare` that a source reads; none if it reads pictures."""
    return [part for part in source.sources if isinstance(part, Prepared)]


MOST_INDEX = 2**30
"""Bytes of index.json; 9 MB for a hundred million pictures."""


def _check_index(index: Mapping[str, Any]) -> None:
    """`ValueError`, `LookupError` or `TypeError` for values of another type, or files elsewhere."""

    def check(values: Any, kind: type) -> None:
        if not set(map(type, values)) <= {kind}:
            raise ValueError

    sides = (index["resolution"], *(n for size in index["buckets"] for n in size))
    check(sides, int)
    check(index["captions"], str)
    check((index["captions"],), list)
    check((index["text_states"], index["autoencoders"]), dict)
    check((*index["text_states"].values(), *index["autoencoders"].values()), dict)
    check((found["digest"] for found in index["autoencoders"].values()), str)
    check((found["config"] for found in index["autoencoders"].values()), dict)
    if MODEL not in index["autoencoders"] or min(sides) < 1 or not index["captions"]:
        raise ValueError
    for shard in index["shards"]:
        check((shard["file"],), str)
        path = PurePosixPath(shard["file"])
        counts = (*shard["counts"], *shard["validation"])
        check(counts, int)
        if path.is_absolute() or ".." in path.parts or min(counts, default=0) < 0:
            raise ValueError


def _read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """index.json and its hash."""
    path = folder / INDEX
    if not path.is_file():
        if (folder / SETTINGS).is_file() and (folder / SHARDS).is_dir():
            raise UserError(f"{folder} is not complete: run its train.prepare again to resume")
        raise UserError(f"{folder} is not a set that train.prepare wrote: it has no {INDEX}")
    try:
        index = read_object(path, most=MOST_INDEX, paths=True)
    except UserError as error:
        raise UserError(f"{error}: run its train.prepare again") from None
    check_version(path, index.get("format_version"), reads=FORMAT_VERSION)
    return index, hashlib.blake2b(read_bytes(path, most=MOST_INDEX), digest_size=8).hexdigest()
