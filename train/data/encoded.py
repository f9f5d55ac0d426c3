"""Batches of encoded pictures and captions."""

import abc
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.autoencoders.semantics import as_codes
from mlx_snapgen.networks.text_encoders.base import Prompt, TextEncoder, present_prompts
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.settings import has_memory, machine_memory
from train.data.imagefolder import PictureFolder, choose, some
from train.data.mixture import Mixture, Prefetched
from train.data.prepared import prepared_parts
from train.data.source import Batch, CodedSource, LatentSource, PictureSource, Samples
from train.data.streams import Stream
from train.data.text import FrozenStates, is_trained, kept_captions, padded_states


def check_channels(config: AutoencoderConfig, channels: int) -> None:
    """`UserError` if an autoencoder takes pictures with other channels than those of the data."""
    if config.picture_channels != channels:
        what = {3: "no alpha channel", 4: "an alpha channel"}
        raise UserError(
            f"the pictures have {what[channels]}, those of the autoencoder have "
            f"{what[config.picture_channels]}"
        )


PROBE = 128
"""Side in pixels of the picture that `check_encoding` measures."""


def check_encoding(autoencoders: Iterable[Autoencoder], side: int, *, batch_size: int) -> None:
    """`UserError` if a batch of pictures with as many pixels as a square cannot be encoded.

    Encoders take 0.8 to 29 kB of memory for each pixel on a CPU, so that a small picture is
    encoded to measure it.

    Args:
        side: of the square, in pixels.
    """
    memory = machine_memory()
    for autoencoder in autoencoders:
        mx.eval(autoencoder.parameters())
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        picture = mx.zeros((1, PROBE, PROBE, autoencoder.config.picture_channels))
        mx.eval(autoencoder.encode(picture))
        each = (mx.get_peak_memory() - before) * (side / PROBE) ** 2
        needed = before + batch_size * each
        if needed > memory:
            fits = int((memory - before) / each)
            instead = f"--batch-size {fits}" if fits > 0 else "a smaller --resolution"
            raise UserError(
                f"encoding {batch_size} pictures of {side} x {side} at a time takes about "
                f"{needed / 2**30:.1f} GiB of memory, and {has_memory()} {memory / 2**30:.1f}: "
                f"choose {instead}"
            )


class EncodedPictures:
    """A `LatentSource`: a `PictureSource` whose pictures are encoded for each batch."""

    def __init__(self, source: PictureSource, autoencoder: Autoencoder):
        self.source = source
        self.encode = mx.compile(autoencoder.encode)

    @property
    def num_samples(self) -> int | None:
        """Number of pictures; None if the source has no end."""
        return self.source.num_samples

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        return self._encoded(*self.source.batch(number, count))

    def batches(self, count: int, *, most: int | None = None) -> Iterator[Samples]:
        """See `PictureSource.batches`."""
        for pictures, captions in self.source.batches(count, most=most):
            yield self._encoded(pictures, captions)

    def _encoded(self, pictures: np.ndarray, captions: list[str]) -> Samples:
        latents = self.encode(from_uint8(pictures))
        mx.eval(latents)
        return Samples(latents, captions)


class CodedScenes:
    """A `LatentSource`: scenes of which an autoencoder knows all, so that nothing is drawn.

    The latents are those of an encoder that makes no mistakes.
    """

    def __init__(self, source: CodedSource, autoencoder: Autoencoder):
        self.source, self.autoencoder = source, autoencoder

    @property
    def num_samples(self) -> int | None:
        """Number of pictures; None if the source has no end."""
        return self.source.num_samples

    def samples(self, number: int, count: int) -> Samples:
        """See `LatentSource`."""
        config = self.autoencoder.config
        assert config.semantics is not None
        seen = self.source.semantics(number, count, factor=config.downsampling)
        semantics = as_codes(mx.array(seen), config.semantics)
        rest = config.latent_channels - semantics.shape[-1]
        latents = mx.pad(semantics, [(0, 0)] * 3 + [(rest, 0)])
        return Samples(self.autoencoder.normalize(latents), self.source.prompts(number, count))

    def batches(self, count: int, *, most: int | None = None) -> Iterator[Samples]:
        """See `PictureSource.batches`."""
        numbers = itertools.count() if most is None else range(-(-most // count))
        for number in numbers:
            rest = count if most is None else min(count, most - number * count)
            found = self.samples(number, count)
            yield Samples(found.latents[:rest], found.captions[:rest])


def _knows(autoencoder: Autoencoder, source: Any) -> bool:
    """Whether an autoencoder has codes for all things of a source."""
    semantics = autoencoder.config.semantics
    counts = [getattr(part, "num_things", None) for part in source.sources]
    return semantics is not None and all(n is not None and n <= semantics.things for n in counts)


def as_latents(source: Any, autoencoder: Autoencoder) -> Any:
    """A `LatentSource` of the data of `open_data`; `UserError` if its latents are others.

    It also has `batches`, as `Prepared` has, unless `source` is a `Mixture`.
    """
    parts = prepared_parts(source)
    if not parts:
        check_channels(autoencoder.config, source.channels)
        if _knows(autoencoder, source):
            return CodedScenes(source, autoencoder)
        if any(_knows(autoencoder, part) for part in source.sources):
            given = source.source if isinstance(source, Prefetched) else source
            found = [as_latents(Prefetched(part), autoencoder) for part in given.sources]
            return Mixture(found, given.weights, seed=given.seed)
        return EncodedPictures(source, autoencoder)
    for part in parts:
        part.check_autoencoder(autoencoder)
        part.check_files()
    return source


class EncodedBatches:
    """Batches of latents, with the text for a model's encoders.

    A batch holds `latents` (B, h, w, C), `NAME_latents` for other latents of the source, and for
    text encoder i `mask_i` (B, L) with `tokens_i` (B, L) if it is trained, or `states_i` (B, L, D)
    if it is frozen.

    Args:
        source: of latents and captions, and optionally states of frozen encoders.
        encoders: the model's text encoders; None for one whose states are in the source.
        batch_size: pictures in a micro-batch.
        seed: of the dropped captions.
        drop_caption: see `kept_captions`.
        absent: the text of a sample without caption is masked out; if false, all encoders get the
            empty prompt. An encoder that is dropped on its own is always masked out.
        noises_per_picture: number of micro-batches of a step with the same pictures; the trainer
            adds different noise to each. This saves time, because rendering and encoding pictures
            takes a fifth of a step.
    """

    def __init__(
        self,
        source: LatentSource,
        encoders: Sequence[Any],
        *,
        batch_size: int,
        seed: int,
        drop_caption: float,
        absent: bool = False,
        noises_per_picture: int = 1,
    ):
        self.source, self.encoders, self.batch_size = source, list(encoders), batch_size
        self.seed, self.drop_caption, self.absent = seed, drop_caption, absent
        self.noises_per_picture = noises_per_picture
        self._samples = functools.lru_cache(maxsize=1)(
            lambda number: source.samples(number, batch_size)
        )
        self._states = [
            None if e is None or is_trained(e.config) else FrozenStates(e) for e in self.encoders
        ]

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""
        return self.with_prompts(number)[0]

    def samples(self, number: int) -> Samples:
        """The samples of batch `number` of the stream."""
        # The trainer numbers batches by step, then micro-batch, then process.
        processes = mx.distributed.init().size()
        group = number // (self.noises_per_picture * processes)
        return self._samples(group * processes + number % processes)

    def first_of(self, number: int) -> int:
        """The first batch of the stream with the samples of batch `number` of the source."""
        processes = mx.distributed.init().size()
        group, rank = divmod(number, processes)
        return group * self.noises_per_picture * processes + rank

    def with_prompts(self, number: int) -> tuple[Batch, list[str]]:
        """Batch `number`, and its captions: "" where no encoder gets the caption."""
        samples = self.samples(number)
        rng = Stream.DROPPED_CAPTIONS.generator(self.seed, number)
        kept = kept_captions(
            rng, len(samples.captions), encoders=len(self.encoders), drop=self.drop_caption
        )
        # A picture without a caption, as one of several columns may leave it, has absent text.
        kept &= np.array([bool(caption) for caption in samples.captions])[:, None]
        given = kept.max(axis=1)
        prompts = [c if g else "" for c, g in zip(samples.captions, given, strict=True)]
        batch = {"latents": samples.latents}
        batch |= {f"{name}_latents": latents for name, latents in samples.other_latents.items()}
        for i in range(len(self.encoders)):
            shown = kept[:, i] if self.absent else kept[:, i] | ~given
            batch[self._name(i)], batch[f"mask_{i}"] = self._text(i, prompts, shown, samples)
        return batch, prompts

    def _name(self, i: int) -> str:
        trained = self.encoders[i] is not None and self._states[i] is None
        return f"tokens_{i}" if trained else f"states_{i}"

    def _text(
        self, i: int, prompts: Sequence[str], shown: np.ndarray, samples: Samples
    ) -> tuple[mx.array, mx.array]:
        """Tokens or states of encoder i, and the mask, false everywhere in rows not `shown`."""
        encoder, encode = self.encoders[i], self._states[i]
        if encoder is not None and encode is None:
            tokens, mask = encoder.tokenize(prompts)
            return tokens, mask & mx.array(shown)[:, None]
        stored = samples.states.get(f"text_encoder_{i}")
        if encode is not None:
            like = encode("") if stored is None else mx.array(stored[0])
        elif stored is not None:
            like = mx.array(stored[0])
        else:
            raise UserError(
                f"the data has no states of text encoder {i}: prepare it for this model"
            )
        rows: list[mx.array | None] = []
        for k, prompt in enumerate(prompts):
            if not shown[k]:
                rows.append(None)
            elif stored is not None and prompt == samples.captions[k]:
                rows.append(mx.array(stored[k]))
            elif encode is not None:
                rows.append(encode(prompt))
            else:
                raise UserError(
                    f"text encoder {i} must be loaded: this model needs its states of the empty "
                    "prompt"
                )
        return padded_states(rows, like, most=encoder and encoder.config.max_length)


CHUNK = 4  # pictures encoded at a time


def encode_captions(encoders: Sequence[TextEncoder], captions: Sequence[Prompt]) -> Batch:
    """`states_i` (N, L, D) and `mask_i` (N, L) of text encoder i."""
    out = {}
    for i, encoder in enumerate(encoders):
        tokens, mask = encoder.tokenize([caption or "" for caption in captions])
        chunks = [slice(k, k + CHUNK) for k in range(0, len(captions), CHUNK)]
        states = mx.concatenate([encoder(tokens[chunk], mask[chunk]) for chunk in chunks])
        out |= {f"states_{i}": states, f"mask_{i}": mask & present_prompts(captions)}
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


class TuningBatches(abc.ABC):
    """Batches of captioned latents for fine-tuning, optionally with prior samples.

    Args:
        seed: of the choice of samples, and of the dropped captions.
        drop_caption: share of captions replaced by the model's unconditional text, for guidance.

    Attributes:
        buckets: samples of each size.
        prior: prior samples, or None.
    """

    def __init__(self, components: Components, *, batch_size: int, drop_caption: float, seed: int):
        self.batch_size, self.seed, self.drop_caption = batch_size, seed, drop_caption
        self.buckets: list[Batch] = []
        self.prior: Batch | None = None
        self.empty = encode_captions(
            components.text_encoders, [components.config.unconditional_prompt]
        )

    @abc.abstractmethod
    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""

    def _dropped(self, rng: np.random.Generator, batch: Batch) -> Batch:
        """The captions of a batch, some of them replaced by the unconditional text."""
        dropped = mx.array((rng.random(len(batch["latents"])) < self.drop_caption).tolist())
        return {
            name: mx.where(dropped.reshape(-1, *[1] * (empty.ndim - 1)), empty, batch[name])
            for name, empty in self.empty.items()
        }


class EncodedFolder(TuningBatches):
    """Batches of a folder's pictures, each batch of one size.

    Pictures and captions are encoded once, here.

    Args:
        prior: from `draw_prior`, or None; half a batch of them is added to every batch.
        drop_caption: see `TuningBatches`.
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
        super().__init__(
            components, batch_size=batch_size, drop_caption=drop_caption, seed=folder.seed
        )
        self.prior, encoders = prior, components.text_encoders
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


class CodedBatches(TuningBatches):
    """Batches of scenes of which an autoencoder knows all, with as many or fewer prior samples.

    Args:
        source: of the scenes to learn.
        prior: of the prior samples, half a batch; None: without.
    """

    def __init__(
        self,
        components: Components,
        source: CodedSource,
        *,
        prior: CodedSource | None,
        batch_size: int,
        drop_caption: float,
        seed: int,
    ):
        super().__init__(components, batch_size=batch_size, drop_caption=drop_caption, seed=seed)
        self._encoders = components.text_encoders
        self._scenes = CodedScenes(source, components.autoencoder)
        self._others = None if prior is None else CodedScenes(prior, components.autoencoder)
        self.buckets = [self._encoded(self._scenes, 0, SHOWN)]
        self.prior = None if self._others is None else self._encoded(self._others, 0, SHOWN)

    def __call__(self, number: int) -> Batch:
        """See `TuningBatches`."""
        rng = Stream.DROPPED_CAPTIONS.generator(self.seed, number)
        batch = self._encoded(self._scenes, number, self.batch_size)
        batch |= self._dropped(rng, batch)
        if self._others is not None:
            prior = self._encoded(self._others, number, max(1, self.batch_size // 2))
            prior |= self._dropped(rng, prior)
            batch |= {f"prior_{name}": value for name, value in prior.items()}
        return batch

    def _encoded(self, scenes: CodedScenes, number: int, count: int) -> Batch:
        samples = scenes.samples(number, count)
        return {"latents": samples.latents} | encode_captions(self._encoders, samples.captions)


SHOWN = 12
"""Scenes in the buckets of `CodedBatches`, for validation."""
