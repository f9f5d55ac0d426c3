"""Batches of encoded pictures and captions for a public model."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_snapgen.checkpoint.module import on_device
from mlx_snapgen.networks.text_encoders.base import Prompt
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.teachers.base import Condition
from mlx_snapgen.teachers.folder import (
    PROMPT_FORMATS,
    TeacherFolder,
    load_prompts,
    load_teacher_autoencoder,
)
from train.data.imagefolder import PictureFolder, choose
from train.data.source import Batch
from train.data.streams import Stream


class PublicPictures:
    """Batches of a folder's pictures, each batch of one size.

    A batch holds `latents` (B, h, w, C), `text` (B, L, D) and `mask` (B, L). Pictures and captions
    are encoded once, here; the networks that do it are loaded one after the other and freed.

    Args:
        drop_caption: share of captions replaced by the unconditional prompt, for guidance.
        prompts: more prompts to encode, for `condition`.

    Attributes:
        latents: (N, h, w, C) for each bucket of `pictures`.
    """

    def __init__(
        self,
        folder: TeacherFolder,
        pictures: PictureFolder,
        *,
        batch_size: int,
        drop_caption: float,
        prompts: Sequence[str] = (),
    ):
        self.batch_size, self.seed, self.drop_caption = batch_size, pictures.seed, drop_caption
        self.captions = [[e.caption for e in bucket] for bucket in pictures.buckets]
        self.empty = PROMPT_FORMATS[folder.config.kind].empty
        autoencoder = load_teacher_autoencoder(folder.path, folder.config)
        self.latents = []
        for bucket in pictures.buckets:
            encoded = []
            for example in bucket:
                pixels = from_uint8(example.pixels[None])
                encoded.append(autoencoder.encode(pixels, in_tiles=True))
                # One at a time: encoders need much memory.
                mx.eval(encoded)
            self.latents.append(mx.concatenate(encoded))
            mx.eval(self.latents)
        del autoencoder
        mx.clear_cache()
        encode = load_prompts(folder.path, folder.config, dtype=on_device(None))
        captions = [caption for bucket in self.captions for caption in bucket]
        self._texts = {text: encode([text]) for text in {self.empty, *captions, *prompts}}
        del encode
        mx.clear_cache()
        # One length, so that a training step is compiled once for each size of pictures.
        length = max(mask.shape[1] for _, mask in self._texts.values())
        for text, (states, mask) in self._texts.items():
            fill = (0, length - mask.shape[1])
            states = mx.pad(states, [(0, 0), fill, (0, 0)])
            self._texts[text] = states, mx.pad(mask, [(0, 0), fill])
        mx.eval(self._texts)

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""
        rng = Stream.PICTURE_FOLDER.generator(self.seed, number)
        bucket, rows = choose(rng, [len(b) for b in self.captions], self.batch_size)
        dropped = rng.random(len(rows)) < self.drop_caption
        captions = [
            self.empty if drop else self.captions[bucket][row]
            for row, drop in zip(rows, dropped, strict=True)
        ]
        return self.rows(bucket, rows, captions)

    def rows(self, bucket: int, rows: Sequence[int], captions: Sequence[Prompt]) -> Batch:
        """Pictures of a bucket with these captions."""
        texts = [self._texts[caption] for caption in captions]
        return {
            "latents": self.latents[bucket][mx.array(list(rows))],
            "text": mx.concatenate([states for states, _ in texts]),
            "mask": mx.concatenate([mask for _, mask in texts]),
        }

    def condition(self, prompt: Prompt) -> Condition:
        """An encoded prompt, with the unconditional one."""
        return Condition(*self._texts[prompt], *self._texts[self.empty])
