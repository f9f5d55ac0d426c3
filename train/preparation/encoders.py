"""Encoders of pictures and captions, and the samples that a prepared set stores of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import TextEncoder
from mlx_snapgen.picture_files import Size
from mlx_snapgen.pictures import from_uint8
from train.data.shards import Sample
from train.data.source import Skipped
from train.data.text import padded_length


@dataclass(frozen=True)
class CaptionEncoder:
    """Encodes captions for `Sample.states`.

    Attributes:
        name: of the text encoder.
        dims: D of its states.
        states: captions -> states (B, L, D) and mask (B, L).
        empty: both of the empty prompt, (1, ...).
    """

    name: str
    dims: int
    states: Callable[[Sequence[str]], tuple[mx.array, mx.array]]
    empty: Callable[[], tuple[mx.array, mx.array]]

    def __call__(self, captions: Sequence[str]) -> list[np.ndarray]:
        """The states (L, D) of the tokens that count, as in `Sample`, of each caption."""
        return self._cut(*self.states(captions))

    def of_empty(self) -> np.ndarray:
        """The same of the empty prompt."""
        return self._cut(*self.empty())[0]

    def _cut(self, states: mx.array, mask: mx.array) -> list[np.ndarray]:
        kept = np.array(mask).astype(bool)
        # What an encoder computes for padding may be anything.
        states, what = mx.where(mask[..., None], states, 0), f"states of {self.name}"
        if states.dtype == mx.bfloat16:
            # Exact, also where float16 would overflow.
            check_finite(states, what)
            values = np.array(states.view(mx.uint16))
        else:
            values = half(states, what)
        return [row[keep] for row, keep in zip(values, kept, strict=True)]


def of_encoder(encoder: TextEncoder, name: str, *, dims: int) -> CaptionEncoder:
    """A model's text encoder; its batches are padded to the longest caption only."""

    def states(captions: Sequence[str]) -> tuple[mx.array, mx.array]:
        tokens, mask = encoder.tokenize(captions)
        longest = int(np.array(mask).sum(1).max())
        length = padded_length(longest, tokens.shape[1])
        tokens, mask = tokens[:, :length], mask[:, :length]
        return encoder(tokens, mask), mask

    return CaptionEncoder(name, dims, states, lambda: states([""]))


@dataclass(frozen=True)
class Picture:
    """A decoded picture, cropped to its bucket.

    Attributes:
        key, captions: of its record; "" where it has no caption of a column.
        original: its size before the crop.
        pixels: uint8 (H, W, 3), of a bucket's size.
        changed: what was changed besides, such as the color space; counted.
    """

    key: str
    captions: Mapping[str, str]
    original: Size
    pixels: np.ndarray
    changed: Sequence[str] = ()

    @property
    def size(self) -> Size:
        return self.pixels.shape[:2]


@dataclass(frozen=True)
class Rejected:
    """A picture that was decoded but not taken; `original` as in `Picture`."""

    skipped: Skipped
    original: Size


Item = Picture | Rejected | Skipped


@dataclass
class Chunk:
    """What a shard gets."""

    samples: list[Sample] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    sizes: list[Size] = field(default_factory=list)


@dataclass
class Encoder:
    """Decoded pictures -> samples.

    Attributes:
        autoencoder: of the model.
        texts: by name of a text encoder.
        others: name -> another autoencoder, whose latents are added.
        batch_size: pictures encoded at a time.
    """

    autoencoder: Autoencoder
    texts: Mapping[str, CaptionEncoder] = field(default_factory=dict)
    others: Mapping[str, Autoencoder] = field(default_factory=dict)
    batch_size: int = 8

    def chunk(
        self, items: Iterable[Item], *, progress: Callable[[int], Any] = lambda count: None
    ) -> Chunk:
        """The samples of a chunk, in the order of its items; `UserError` if not finite."""
        chunk = Chunk()
        waiting: dict[Size, list[tuple[int, Picture]]] = {}
        samples: dict[int, Sample] = {}
        for number, item in enumerate(items):
            if isinstance(item, Skipped):
                chunk.skipped.append(item)
            elif isinstance(item, Rejected):
                chunk.skipped.append(item.skipped)
                chunk.sizes.append(item.original)
            else:
                chunk.sizes.append(item.original)
                chunk.changed.update(item.changed)
                batch = waiting.setdefault(item.size, [])
                batch.append((number, item))
                if len(batch) == self.batch_size:
                    samples |= self._encode(waiting.pop(item.size))
            progress(1)
        for size in sorted(waiting):
            samples |= self._encode(waiting[size])
        chunk.samples = [samples[number] for number in sorted(samples)]
        return chunk

    def _encode(self, numbered: Sequence[tuple[int, Picture]]) -> dict[int, Sample]:
        numbers, pictures = zip(*numbered, strict=True)
        return dict(zip(numbers, self.encode(pictures), strict=True))

    def encode(self, pictures: Sequence[Picture]) -> list[Sample]:
        """Samples of pictures of one size."""
        pixels = from_uint8(np.stack([picture.pixels for picture in pictures]))
        latents = half(self.autoencoder.encode(pixels), "latents")
        others = {
            name: half(other.encode(pixels), f"latents of the {name}")
            for name, other in self.others.items()
        }
        return make_samples(
            [picture.key for picture in pictures],
            [picture.captions for picture in pictures],
            latents=latents,
            others=others,
            size=pictures[0].size,
            texts=self.texts,
        )


def make_samples(
    keys: Sequence[str],
    captions: Sequence[Mapping[str, str]],
    *,
    latents: np.ndarray,
    others: Mapping[str, np.ndarray],
    size: Size,
    texts: Mapping[str, CaptionEncoder],
) -> list[Sample]:
    """Samples of latents (B, h, w, C) of one size, with the text states of their captions."""
    states = {
        name: {column: encode([c[column] for c in captions]) for column in captions[0]}
        for name, encode in texts.items()
    }
    return [
        Sample(
            key,
            size,
            captions[i],
            latents[i],
            states={
                name: {column: rows[i] for column, rows in columns.items()}
                for name, columns in states.items()
            },
            other_latents={name: rows[i] for name, rows in others.items()},
        )
        for i, key in enumerate(keys)
    ]


def half(values: mx.array, what: str) -> np.ndarray:
    """Values in float16; `UserError` if they are not finite or too large for that."""
    found = values.astype(mx.float16)
    check_finite(found, what)
    return np.array(found)


def check_finite(values: mx.array, what: str) -> None:
    """`UserError` unless all values are finite."""
    if not mx.isfinite(values).all().item():
        raise UserError(f"the {what} are not finite in 16 bits: the model is damaged")


@dataclass(frozen=True)
class Measured:
    """Of the first samples.

    Attributes:
        seconds: of a record, without what takes time only once.
        share: of the records that become samples.
    """

    samples: list[Sample]
    seconds: float
    share: float = 1.0

    @property
    def nbytes(self) -> float:
        """Of a record, on the disk."""
        return self.share * sum(sample.nbytes for sample in self.samples) / len(self.samples)
