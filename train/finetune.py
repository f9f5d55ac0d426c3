"""What fine-tuning is made of: the step, the encoded pictures, the estimate and the validation.

A LoRA learns pictures by flow matching, one width in a step. What the model knew is kept by prior
preservation (DreamBooth, arXiv 2208.12242, section 3.2, with the model's own velocity in place of
its samples as the target): on pictures that the model has drawn of prompts it knows, the network
with the LoRA is to predict what it predicts without.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.config import WIDTH_NAMES
from mlx_snapgen.draw import sample
from mlx_snapgen.lora.adapters import acting
from mlx_snapgen.networks.autoencoders.base import Autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import TextEncoder, TextStates
from train.autoencoder import to_float
from train.engine import Batch, Trainer
from train.imagefolder import Example
from train.losses import add_noise, per_sample
from train.previews import Previews
from train.supernetwork import noisy

FIXED, LEVELS = 12, 4  # samples of a bucket, and noise levels, of the validation loss
CHUNK = 4  # pictures encoded at a time
PRIOR_SEED = 1_000_000  # of the first prior picture, away from seeds that people type


# --- the step -----------------------------------------------------------------------------------


def gradients(
    network: EfficientDiT, batch: Batch, key: mx.array, width: float, shift: float, prior: float
):
    """Gradients of one width, as `Trainer` takes them.

    Args:
        batch: `latents` (B, H, W, C), and for text encoder i `states_i` (B, L, D) and `mask_i`
            (B, L); with prior samples the same once more, all names after `prior_`.
        shift: timestep shift.
        prior: weight of the prior samples' loss.
    """
    keys = mx.random.split(key)
    x_t, t, v = noisy(batch["latents"], keys[0], shift)
    if "prior_latents" in batch:
        prior_x_t, prior_t, _ = noisy(batch["prior_latents"], keys[1], shift)
        with acting(network):
            kept = mx.stop_gradient(velocity(network, batch, prior_x_t, prior_t, width, "prior_"))

    def loss_fn(params):
        network.update(params)
        diffusion = per_sample(velocity(network, batch, x_t, t, width) - v).mean()
        metrics = {f"loss_{width:g}": diffusion}
        if "prior_latents" not in batch:
            return diffusion, metrics
        drift = velocity(network, batch, prior_x_t, prior_t, width, "prior_") - kept
        metrics[f"prior_{width:g}"] = per_sample(drift).mean()
        return diffusion + prior * metrics[f"prior_{width:g}"], metrics

    params = network.trainable_parameters()
    (_, metrics), grads = mx.value_and_grad(loss_fn)(params)
    network.update(params)
    return grads, metrics


def velocity(
    network: EfficientDiT, batch: Batch, x_t: mx.array, t: mx.array, width: float, part: str = ""
) -> mx.array:
    """The network's velocity for the captions of one `part` of a batch."""
    states = [
        TextStates(batch[f"{part}states_{i}"].astype(network.dtype), batch[f"{part}mask_{i}"])
        for i in range(len(network.text))
    ]
    return network(x_t, t, *network.encode_text(states), width)


def step_width(widths: Sequence[float], seed: int, step: int) -> float:
    """The width of a step: full every other time, if it is among them, else any other."""
    rng = np.random.default_rng((seed, step, 6))
    others = [width for width in widths if width != 1.0]
    if 1.0 in widths and (not others or rng.random() < 0.5):
        return 1.0
    return float(rng.choice(others))


# --- data ---------------------------------------------------------------------------------------


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
        chunk = to_float(np.stack(pictures[start : start + CHUNK]))
        latents.append(autoencoder.encode(chunk))
        mx.eval(latents)
    return mx.concatenate(latents)


def rows(batch: Batch, chosen: Sequence[int] | slice) -> Batch:
    """These rows of all arrays of a batch."""
    index = chosen if isinstance(chosen, slice) else mx.array(chosen)
    return {name: value[index] for name, value in batch.items()}


def draw_prior(components: Components, captions: Sequence[str]) -> Batch:
    """What the model knows: `latents` of its pictures of `captions`, with the encoded captions."""
    with tqdm(total=len(captions), desc="what the model knows", unit="picture") as bar:
        seeds = range(PRIOR_SEED, PRIOR_SEED + len(captions))
        pictures = sample(components, captions, seeds, progress=bar.update)
    latents = encode_pictures(components.autoencoder, list(pictures))
    return {"latents": latents} | encode_captions(components.text_encoders, captions)


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


# --- before and during the run ------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a run will need, measured on this machine.

    Attributes:
        step: seconds of a step.
        picture: seconds to draw a picture.
        memory: bytes at most.
    """

    step: float
    picture: float
    memory: int

    def told(self, steps: int, pictures: int) -> str:
        """Such as "about 4 minutes (400 steps of 0.60 s, 56 pictures of 0.5 s), 0.3 GB"."""
        seconds = steps * self.step + pictures * self.picture
        if seconds < 100:
            long = f"{seconds:.0f} seconds"
        elif seconds < 6000:
            long = f"{seconds / 60:.0f} minutes"
        else:
            long = f"{seconds / 3600:.1f} hours"
        return (
            f"about {long} ({steps} steps of {self.step:.2f} s, {pictures} pictures to draw of "
            f"{self.picture:.1f} s) and {self.memory / 1e9:.1f} GB of memory"
        )


def estimate(
    components: Components, batch: Batch, widths: Mapping[float, float], accumulate: int = 1
) -> Estimate:
    """Measure a step and a picture, without changing the model.

    Memory is that of one sample times the samples of a batch. Where the machine has less than
    that, a step's time is taken from one sample as well.

    Args:
        batch: as the steps get it.
        widths: how often each is trained; the shares add up to 1.
        accumulate: batches in a step.
    """
    network, widest = components.transformer, max(widths)

    def count(some: Batch) -> int:
        return sum(len(value) for name, value in some.items() if name.endswith("latents"))

    def seconds(some: Batch, width: float) -> float:
        started = time.perf_counter()
        mx.eval(gradients(network, some, mx.random.key(0), width, 1.0, 1.0))
        return time.perf_counter() - started

    one = rows(batch, slice(1))
    mx.eval(components.modules(), batch, one)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds(one, widest)
    each = (mx.get_peak_memory() - before) / count(one)
    trained = sum(p.size for _, p in tree_flatten(network.trainable_parameters()))
    # Besides float32 gradients there are the averages and two moments of the optimizer.
    memory = round(before + count(batch) * each + 16 * trained)
    some, times = (one, count(batch) / count(one)) if memory > physical_memory() else (batch, 1)
    # The first step of a kind is slower than those that follow.
    step = sum(
        share * times * min(seconds(some, width) for _ in range(2))
        for width, share in widths.items()
    )
    sample(components, ["a"], [0], widest, steps=1)
    started = time.perf_counter()
    sample(components, ["a"], [0], widest, steps=4)
    picture = (time.perf_counter() - started) / 4 * components.config.sampler.num_inference_steps
    return Estimate(accumulate * step, picture, memory)


def physical_memory() -> int:
    """Bytes of main memory; a Mac's GPU shares it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Validation:
    """After each checkpoint: pictures of `prompts`, and losses at fixed noise, of the averages."""

    def __init__(
        self, components: Components, data: Pictures, prompts: Sequence[str], width: str = "full"
    ):
        self.network, self.data, self.width = components.transformer, data, WIDTH_NAMES[width]
        self.previews = Previews(components, [width], prompts)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        current = self.network.trainable_parameters()
        self.network.update(trainer.ema_parameters)
        try:
            metrics = {"validation_loss": self.loss()}
            if self.data.prior:
                metrics["prior_drift"] = self.drift()
        finally:
            self.network.update(current)
        return metrics | self.previews(trainer)

    def loss(self) -> float:
        """Mean squared error of the velocity, over pictures of each size and fixed noise."""
        errors = []
        for bucket in self.data.buckets:
            for x_t, t, eps, some in _levels(bucket):
                v = velocity(self.network, some, x_t, t, self.width)
                errors += per_sample(v - (eps - some["latents"])).tolist()
        return float(np.mean(errors))

    def drift(self) -> float:
        """Mean squared change of the velocity on the prior samples."""
        changes = []
        for x_t, t, _, some in _levels(self.data.prior):
            v = velocity(self.network, some, x_t, t, self.width)
            with acting(self.network):
                before = velocity(self.network, some, x_t, t, self.width)
            changes += per_sample(v - before).tolist()
        return float(np.mean(changes))


def _levels(batch: Batch) -> Iterator[tuple[mx.array, mx.array, mx.array, Batch]]:
    """(x_t, t, eps, rows) over the first `FIXED` at the noise levels (k + .5) / LEVELS."""
    eps = mx.random.normal(batch["latents"][:FIXED].shape, key=mx.random.key(0))
    for start in range(0, len(eps), CHUNK):
        chunk = slice(start, start + CHUNK)
        some = rows(batch, slice(start, min(start + CHUNK, FIXED)))
        for k in range(LEVELS):
            t = mx.full((len(some["latents"]),), (k + 0.5) / LEVELS)
            yield add_noise(some["latents"], eps[chunk], t), t, eps[chunk], some
