"""Batches of encoded pictures and captions."""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.text_encoders.base import TextEncoder, Tokenizer
from mlx_snapgen.pictures import from_uint8
from train.data.imagefolder import Example
from train.data.source import Batch
from train.data.stickers import render


class Data:
    """Batches of encoded scenes with tokenized captions.

    Args:
        drop_caption: share of captions replaced by the empty prompt, for guidance; with several
            encoders each drops on its own.
        categories: kinds of scenes to draw, of `stickers.scenes.CATEGORIES`; None for all.
        noises_per_scene: how many micro-batches of a step show the same scenes, for the trainer to
            put different noise on them; drawing and encoding them is a fifth of a step's time.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        tokenizers: Sequence[Tokenizer],
        batch_size: int,
        num_nouns: int | None,
        seed: int,
        drop_caption: float,
        categories: Sequence[str] | None = None,
        noises_per_scene: int = 1,
    ):
        self.tokenizers, self.batch_size, self.num_nouns = tokenizers, batch_size, num_nouns
        self.categories, self.noises_per_scene = categories, noises_per_scene
        self.scenes = functools.lru_cache(maxsize=1)(self._scenes)
        self.seed, self.drop_caption = seed, drop_caption
        self.encode = mx.compile(autoencoder.encode)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; the same whenever it is asked for."""
        return self.with_prompts(number)[0]

    def with_prompts(self, number: int) -> tuple[Batch, list[str]]:
        """Batch `number` and what it was told: captions, "" where no encoder was given any."""
        # The engine numbers batches by step, then micro-batch, then process.
        processes = mx.distributed.init().size()
        step = number // (self.noises_per_scene * processes)
        latents, captions = self.scenes(step * processes + number % processes)
        batch = {"latents": latents}
        rng = np.random.default_rng((self.seed, number, 2))
        told = [""] * self.batch_size
        for i, tokenizer in enumerate(self.tokenizers):
            dropped = rng.random(self.batch_size) < self.drop_caption
            kept = ["" if d else c for d, c in zip(dropped, captions, strict=True)]
            batch[f"tokens_{i}"], batch[f"mask_{i}"] = tokenizer(kept)
            told = [a or b for a, b in zip(kept, told, strict=True)]
        return batch, told

    def _scenes(self, number: int) -> tuple[mx.array, list[str]]:
        """Latents and captions of one batch of scenes."""
        start = number * self.batch_size
        pictures, captions = render.batch(
            self.seed, start, self.batch_size, self.num_nouns, categories=self.categories
        )
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
    index = chosen if isinstance(chosen, slice) else mx.array(chosen)
    return {name: value[index] for name, value in batch.items()}


class Pictures:
    """Batches of encoded pictures, each batch of one bucket, and prior samples with them.

    Pictures and captions are encoded once, here.

    Args:
        prior: from `draw_prior`, or None; half a batch of these joins every batch.
        drop_caption: share of captions replaced by the empty prompt, for guidance.
        flip: also learn the pictures' mirror images.
    """

    def __init__(
        self,
        components: Components,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        drop_caption: float = 0.1,
        flip: bool = False,
        prior: Batch | None = None,
    ):
        self.batch_size, self.seed, self.drop_caption = batch_size, seed, drop_caption
        self.prior, self.buckets = prior, []
        encoders = components.text_encoders
        self.empty = encode_captions(encoders, [""])
        for size in sorted({example.size for example in examples}):
            some = [example for example in examples if example.size == size]
            captions = [example.caption for example in some]
            pixels = [example.pixels for example in some]
            if flip:
                captions, pixels = captions * 2, pixels + [p[:, ::-1] for p in pixels]
            latents = encode_pictures(components.autoencoder, pixels)
            self.buckets.append({"latents": latents} | encode_captions(encoders, captions))

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; the same whenever it is asked for."""
        rng = np.random.default_rng((self.seed, number, 7))
        counts = np.array([len(bucket["latents"]) for bucket in self.buckets])
        bucket = self.buckets[rng.choice(len(counts), p=counts / counts.sum())]
        batch = rows(bucket, _some(rng, len(bucket["latents"]), self.batch_size))
        batch |= self._dropped(rng, batch)
        if self.prior:
            count = max(1, self.batch_size // 2)
            prior = rows(self.prior, _some(rng, len(self.prior["latents"]), count))
            # Guidance needs what the model knows without a caption as well.
            prior |= self._dropped(rng, prior)
            batch |= {f"prior_{name}": value for name, value in prior.items()}
        return batch

    def _dropped(self, rng: np.random.Generator, batch: Batch) -> Batch:
        """The captions of a batch, some of them replaced by the empty prompt."""
        dropped = mx.array(rng.random(len(batch["latents"])) < self.drop_caption)
        return {
            name: mx.where(dropped.reshape(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
            for name, empty in self.empty.items()
        }


def _some(rng: np.random.Generator, total: int, count: int) -> list[int]:
    """`count` of `total`, each at most once as long as there are enough."""
    return rng.choice(total, count, replace=count > total).tolist()
