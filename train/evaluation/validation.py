"""Flow validation loss: the error of the predicted velocity on fixed latents, noise and levels.

The noise levels are t = (k + .5) / `NUM_LEVELS`, without time shift, so that models with different
shifts are compared on the same levels.

`flow_losses` measures the held-out part of any set, `FlowValidation` at the checkpoints of a run;
`validation_losses` the stickers' fixed scenes.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import announce, picture_bar
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.networks.text_encoders.base import TextStates, encode_states
from mlx_snapgen.pictures import from_uint8
from mlx_snapgen.sampling import Progress, add_noise, get_noise
from mlx_snapgen.settings import Width
from mlx_snapgen.teachers.base import Teacher
from train.data.source import PictureSource, Samples
from train.loop.trainer import Trainer

NUM_LEVELS = 8


# --- the held-out part of a set -------------------------------------------------------------------


def held_out_batches(source: Any, count: int, *, batch_size: int = 16) -> list[Samples]:
    """Up to `count` samples of a part for validation, all of a batch of one size.

    The samples are the same in every run, and each size has its share of them. Those without a
    caption are left out.

    Args:
        source: `as_latents` of `validation()` of a source of data, or of one of its parts.
        batch_size: samples of a batch, at most.
    """
    found: list[Samples] = []
    total = min(count, source.num_samples or count)
    with tqdm(total=total, desc="validation set", unit="picture", leave=False) as bar:
        for samples in source.batches(batch_size, most=count):
            bar.update(len(samples.captions))
            rows = [row for row, caption in enumerate(samples.captions) if caption]
            if rows:
                found.append(_rows(samples, rows) if len(rows) < len(samples.captions) else samples)
    return found


def _rows(samples: Samples, rows: Sequence[int]) -> Samples:
    """These rows of some samples."""
    index = mx.array(list(rows))
    return Samples(
        samples.latents[index],
        [samples.captions[row] for row in rows],
        states={name: [x[row] for row in rows] for name, x in samples.states.items()},
        other_latents={name: x[index] for name, x in samples.other_latents.items()},
    )


def sample_seed(caption: str, latents: mx.array) -> int:
    """The seed, in [0, 2^32), of a sample's noise: a hash of its caption and latents (h, w, C).

    The noise does not depend on the sample's place in the set.
    """
    state = hashlib.blake2b(caption.encode(errors="surrogateescape"), digest_size=4)
    state.update(np.array(latents.astype(mx.float16)).tobytes())
    return int.from_bytes(state.digest(), "big")


def flow_losses(
    transformer: EfficientDiT,
    encoders: Sequence[Any],
    *,
    batches: Iterable[Samples],
    shares: Sequence[float],
    progress: Progress | None = None,
) -> dict[float, list[float]]:
    """Mean squared error of the velocity at the noise levels (k + .5) / `NUM_LEVELS`.

    It is the loss of `train.flow` on samples that were not trained on, with fixed noise: that of
    `sample_seed`. Every sample counts the same, whatever its size.

    Args:
        encoders: the model's text encoders; None for one whose states the samples have.
        batches: such as `held_out_batches`.
        shares: of the widths to measure.

    Returns:
        share -> `NUM_LEVELS` losses, from the lowest noise level.
    """
    sums = {share: np.zeros(NUM_LEVELS) for share in shares}
    total = 0
    for samples in batches:
        text, mask = transformer.encode_text(_states(samples, encoders, dtype=transformer.dtype))
        x0 = samples.latents
        eps = _noise(samples)
        for share in shares:
            velocity = _velocity(transformer, text, mask, share=share)
            sums[share] += _errors(velocity, x0, eps=eps, progress=progress, parts=len(shares))
        total += len(samples.captions)
    return {share: (errors / max(total, 1)).tolist() for share, errors in sums.items()}


def teacher_losses(
    teacher: Teacher, batches: Iterable[Samples], progress: Progress | None = None
) -> list[float]:
    """`flow_losses` of a teacher, without guidance."""
    sums, total = np.zeros(NUM_LEVELS), 0
    for samples in batches:
        velocity = partial(teacher.velocity, condition=teacher.encode(samples.captions))
        sums += _errors(velocity, samples.latents, eps=_noise(samples), progress=progress)
        total += len(samples.captions)
    return (sums / max(total, 1)).tolist()


def _noise(samples: Samples) -> mx.array:
    """The samples' fixed noise, shaped like their latents."""
    pairs = zip(samples.captions, samples.latents, strict=True)
    seeds = [sample_seed(caption, latents) for caption, latents in pairs]
    return mx.concatenate([get_noise(seed, *samples.latents.shape[1:]) for seed in seeds])


def _states(
    samples: Samples, encoders: Sequence[Any], *, dtype: mx.Dtype
) -> list[TextStates | None]:
    """The states of all text encoders, from the samples where they have them."""
    stored = [samples.states.get(f"text_encoder_{i}") for i in range(len(encoders))]
    missing = [e if rows is None else None for e, rows in zip(encoders, stored, strict=True)]
    states = encode_states(samples.captions, missing, dtype=dtype)
    for i, rows in enumerate(stored):
        if rows is not None:
            states[i] = _padded(rows, dtype)
    return states


def _with_frozen_states(samples: Samples, encoders: Sequence[Any]) -> Samples:
    """The samples with the states of the encoders that are not trained, cut to their tokens."""
    states = dict(samples.states)
    for i, encoder in enumerate(encoders):
        name = f"text_encoder_{i}"
        if encoder is None or encoder.config.kind == "transformer" or name in states:
            continue
        (found,) = encode_states(samples.captions, [encoder], dtype=mx.float32)
        assert found is not None
        counts = np.array(found.mask.sum(axis=1)).tolist()
        states[name] = [np.array(s[:n]) for s, n in zip(found.states, counts, strict=True)]
    return replace(samples, states=states)


def _padded(rows: Sequence[np.ndarray], dtype: mx.Dtype) -> TextStates:
    """States (L, D) of several captions as one batch."""
    counts = [len(row) for row in rows]
    length = max(counts)
    padded = [np.pad(row, [(0, length - len(row)), (0, 0)]) for row in rows]
    mask = mx.arange(length)[None] < mx.array(counts)[:, None]
    return TextStates(mx.array(np.stack(padded)).astype(dtype), mask)


Velocity = Callable[[mx.array, mx.array], mx.array]
"""x_t and t (B,) -> v."""


def _velocity(
    transformer: EfficientDiT, text: mx.array, mask: mx.array, *, share: float
) -> Velocity:
    return lambda x_t, t: transformer(x_t.astype(text.dtype), t, text, mask, share=share)


def _errors(
    velocity: Velocity,
    x0: mx.array,
    *,
    eps: mx.array,
    progress: Progress | None = None,
    parts: int = 1,
) -> np.ndarray:
    """Sum over a batch of the mean squared error of the velocity, at each noise level.

    Args:
        parts: calls of this function for each picture.
    """
    sums = np.zeros(NUM_LEVELS)
    for k in range(NUM_LEVELS):
        sigma = (k + 0.5) / NUM_LEVELS
        v = velocity(add_noise(x0, eps, sigma), mx.full((len(x0),), sigma))
        error = (v.astype(mx.float32) - (eps - x0)).square().mean(axis=(1, 2, 3))
        sums[k] = error.sum().item()
        if progress is not None:
            progress(len(x0) / (NUM_LEVELS * parts))
    return sums


class FlowValidation:
    """`validate` of a `Trainer`: the mean of `flow_losses` of each width, with averaged weights.

    Args:
        transformer, encoders: of the model that is trained.
        batches: see `held_out_batches`; kept in memory.
        widths: the widths to measure.
    """

    def __init__(
        self,
        transformer: EfficientDiT,
        encoders: Sequence[Any],
        *,
        batches: Sequence[Samples],
        widths: Sequence[Width],
    ):
        self.transformer, self.encoders = transformer, list(encoders)
        self.widths = list(widths)
        # Frozen encoders are slow, and their states stay the same.
        self.batches = [_with_frozen_states(samples, self.encoders) for samples in batches]

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Metrics for the log: `validation_WIDTH`."""
        shares = [width.share for width in self.widths]
        total = sum(len(samples.captions) for samples in self.batches)
        with trainer.averaged(), picture_bar(total, "validation loss") as progress:
            losses = flow_losses(
                self.transformer,
                self.encoders,
                batches=self.batches,
                shares=shares,
                progress=progress,
            )
        return {f"validation_{w.name}": float(np.mean(losses[w.share])) for w in self.widths}


# --- the stickers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationSet:
    """Latents and noise of the validation loss, the same for every width.

    Attributes:
        latents, noise: (N, h, w, C).
        captions: one for each.
    """

    latents: mx.array
    noise: mx.array
    captions: list[str]


def validation_set(components: Components, source: PictureSource, *, count: int) -> ValidationSet:
    """The first `count` pictures of a source. Noise depends on a picture's index and caption."""
    with announce("drawing the validation set ..."):
        pictures, captions = source.batch(0, count)
    starts = tqdm(range(0, count, 16), desc="validation set", unit="batch", leave=False)
    latents = mx.concatenate(
        [components.autoencoder.encode(from_uint8(pictures[k : k + 16])) for k in starts]
    )
    seeds = [noise_seed(k, caption) for k, caption in enumerate(captions)]
    noise = mx.concatenate([get_noise(seed, *latents.shape[1:]) for seed in seeds])
    return ValidationSet(latents, noise, captions)


def noise_seed(index: int, caption: str) -> int:
    """The seed, in [0, 2^32), of one validation sample's noise."""
    digest = hashlib.blake2b(f"{index}|{caption}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def validation_losses(
    components: Components,
    data: ValidationSet,
    *,
    share: float,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[float]:
    """Mean squared error of the velocity at the noise levels (k + .5) / NUM_LEVELS."""
    sums = np.zeros(NUM_LEVELS)
    for start in range(0, len(data.captions), batch_size):
        chosen = slice(start, start + batch_size)
        captions = data.captions[chosen]
        text, mask = encode_prompts(
            captions, components.text_encoders, transformer=components.transformer
        )
        velocity = _velocity(components.transformer, text, mask, share=share)
        latents, noise = data.latents[chosen], data.noise[chosen]
        sums += _errors(velocity, latents, eps=noise, progress=progress)
    return (sums / len(data.captions)).tolist()
