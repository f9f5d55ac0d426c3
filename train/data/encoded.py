"""Batches of encoded pictures and captions."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import TextEncoder, Tokenizer
from mlx_snapgen.pictures import from_uint8
from train.data.imagefolder import PictureFolder, choose, some
from train.data.source import Batch, PictureSource
from train.data.streams import Stream


class EncodedBatches:
    """Batches of encoded pictures of any source, with tokenized captions.

    Args:
        batch_size: pictures in a micro-batch.
        seed: of the dropped captions.
        drop_caption: share of captions replaced by the empty prompt, for guidance; several encoders
            drop captions independently.
        noises_per_picture: number of micro-batches of a step with the same pictures; the trainer
            adds different noise to each. This saves time, because rendering and encoding pictures
            takes a fifth of a step.
    """

    def __init__(
        self,
        source: PictureSource,
        autoencoder: Autoencoder,
        tokenizers: Sequence[Tokenizer],
        *,
        batch_size: int,
        seed: int,
        drop_caption: float,
        noises_per_picture: int = 1,
    ):
        self.source, self.tokenizers, self.batch_size = source, tokenizers, batch_size
        self.noises_per_picture = noises_per_picture
        self.pictures = functools.lru_cache(maxsize=1)(self._pictures)
        self.seed, self.drop_caption = seed, drop_caption
        self.encode = mx.compile(autoencoder.encode)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""
        return self.with_prompts(number)[0]

    def with_prompts(self, number: int) -> tuple[Batch, list[str]]:
        """Batch `number`, and its captions: "" where all encoders get the empty prompt."""
        # The trainer numbers batches by step, then micro-batch, then process.
        processes = mx.distributed.init().size()
        step = number // (self.noises_per_picture * processes)
        latents, captions = self.pictures(step * processes + number % processes)
        batch = {"latents": latents}
        rng = Stream.DROPPED_CAPTIONS.generator(self.seed, number)
        given = [""] * self.batch_size
        for i, tokenizer in enumerate(self.tokenizers):
            dropped = rng.random(self.batch_size) < self.drop_caption
            kept = ["" if d else c for d, c in zip(dropped, captions, strict=True)]
            batch[f"tokens_{i}"], batch[f"mask_{i}"] = tokenizer(kept)
            given = [a or b for a, b in zip(kept, given, strict=True)]
        return batch, given

    def _pictures(self, number: int) -> tuple[mx.array, list[str]]:
        """Latents and captions of batch `number` of the source."""
        pictures, captions = self.source.batch(number, self.batch_size)
        latents = self.encode(from_uint8(pictures))
        mx.eval(latents)
        return latents, captions


CHUNK = 4  # pictures encoded at a time


def encode_captions(encoders: Sequence[TextEncoder], captions: Sequence[str]) -> Batch:
    """`states_i` (N, L, D) and `mask_i` (N, L) of text encoder i."""
    out = {}
    for i, encoder in enumerate(encoders):
        tokens, mask = encoder.tokenize(captions)
        chunks = [slice(k, k + CHUNK) for k in range(0, len(captions), CHUNK)]
        states = mx.concatenate([encoder(tokens[chunk], mask[chunk]) for chunk in chunks])
        out |= {f"states_{i}": states, f"mask_{i}": mask}
    mx.eval(out)
    return out


def encode_pictures(autoencoder: Autoencoder, pictures: Sequence[np.ndarray]) -> mx.array:
    """uint8 pictures (H, W, 3) of one size -> latents (N, h, w, C)."""
    latents = []
    for start in range(0, len(pictures), CHUNK):
        chunk = from_uint8(np.stack(pictures[start : start + CHUNK]))
        latents.append(autoencoder.encode(chunk))
        mx.eval(latents)
    return mx.concatenate(latents)


def rows(batch: Batch, chosen: Sequence[int] | slice) -> Batch:
    """These rows of all arrays of a batch."""
    index = chosen if isinstance(chosen, slice) else mx.array(list(chosen))
    return {name: value[index] for name, value in batch.items()}


class EncodedFolder:
    """Batches of a folder's pictures, each batch of one size, optionally with prior samples.

    Pictures and captions are encoded once, here.

    Args:
        prior: from `draw_prior`, or None; half a batch of them is added to every batch.
        drop_caption: share of captions replaced by the empty prompt, for guidance.
    """

    def __init__(
        self,
        components: Components,
        folder: PictureFolder,
        *,
        batch_size: int,
        drop_caption: float = 0.1,
        prior: Batch | None = None,
    ):
        self.batch_size, self.seed, self.drop_caption = batch_size, folder.seed, drop_caption
        self.prior: Batch | None = prior
        self.buckets: list[Batch] = []
        encoders = components.text_encoders
        self.empty = encode_captions(encoders, [""])
        for bucket in folder.buckets:
            latents = encode_pictures(components.autoencoder, [e.pixels for e in bucket])
            captions = encode_captions(encoders, [e.caption for e in bucket])
            self.buckets.append({"latents": latents} | captions)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""
        rng = Stream.PICTURE_FOLDER.generator(self.seed, number)
        bucket, chosen = choose(rng, [len(b["latents"]) for b in self.buckets], self.batch_size)
        batch = rows(self.buckets[bucket], chosen)
        batch |= self._dropped(rng, batch)
        if self.prior:
            count = max(1, self.batch_size // 2)
            prior = rows(self.prior, some(rng, len(self.prior["latents"]), count))
            # Guidance also needs the model's velocity without a caption.
            prior |= self._dropped(rng, prior)
            batch |= {f"prior_{name}": value for name, value in prior.items()}
        return batch

    def _dropped(self, rng: np.random.Generator, batch: Batch) -> Batch:
        """The captions of a batch, some of them replaced by the empty prompt."""
        dropped = mx.array((rng.random(len(batch["latents"])) < self.drop_caption).tolist())
        return {
            name: mx.where(dropped.reshape(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
            for name, empty in self.empty.items()
        }
