"""Seconds of the parts of a training step, for `mlx_snapgen.benchmark --suite training`.

Random weights, latents and text states. Gradients and updates are compiled as the trainer does.
"""

import io
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from PIL import Image

from mlx_snapgen.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, TransformerConfig
from mlx_snapgen.measure import time_in_turn
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.picture_files import decode
from train.data.imagefolder import fit
from train.data.mixture import Prefetched
from train.loop.config import TrainingConfig
from train.loop.optimizer import Optimizers, Role
from train.objectives.elastic import ElasticStep, TextToLatents
from train.objectives.flow import Flow

NETWORK = TransformerConfig(
    hidden_size=1024, num_cross_kv_heads=2, blocks=(1, 2, 1), text_dims=(512,)
)
"""Four blocks of the paper's small width, as a supernetwork of its own."""
TOKENS = 77


def measure_training(
    config: TransformerConfig = NETWORK,
    *,
    side: int = 32,
    batch_size: int = 8,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of parts of a step, by name, after one call of each; they take turns.

    "full" and, for each sub-network, "full + SHARE" are gradients; "SHARE alone" is a stand-alone
    network of the sub-network's width, so that full and it together are the arithmetic of the
    elastic step. "adamw" and "muon" are updates of all parameters. "read" and "wait" are those of
    `measure_reading`, always wall-clock seconds.

    Args:
        side: of the latents.
        clock: such as `time.process_time`, which counts the seconds of all threads.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        mx.set_cache_limit(4 << 30)  # as the trainer does
    mx.random.seed(0)
    model = _model(config)
    batch = {
        "latents": mx.random.normal((batch_size, side, side, config.latent_channels)),
        "states_0": mx.random.normal((batch_size, TOKENS, config.text_dims[0])),
        "mask_0": mx.ones((batch_size, TOKENS), mx.bool_),
    }
    key = mx.random.key(0)
    mx.eval(model.parameters(), batch, key)
    runs: dict[str, Callable[[], Any]] = {"full": _gradients(model, batch, key, shares=())}
    for share in config.widths[1:]:
        alone = _model(config.standalone(share))
        alone.transformer = extract(model.transformer, share)
        mx.eval(alone.parameters())
        runs[f"{share:g} alone"] = _gradients(alone, batch, key, shares=())
        runs[f"full + {share:g}"] = _gradients(model, batch, key, shares=(share,))
    for name in ("adamw", "muon"):
        runs[name] = _update(model, TrainingConfig(steps=100, optimizer=name))
    times = time_in_turn(runs, repeats, clock=clock)
    found = {name: some["seconds"] for name, some in times.items()}
    pixels = 8 * side
    return found | measure_reading(
        runs["full"], side=pixels, batch_size=batch_size, repeats=repeats
    )


def _model(config: TransformerConfig) -> TextToLatents:
    encoder = TextEncoderConfig(kind="clip", hidden_size=config.text_dims[0], source="none")
    autoencoder = AutoencoderConfig(latent_channels=config.latent_channels)
    whole = ModelConfig(transformer=config, autoencoder=autoencoder, text_encoders=(encoder,))
    return TextToLatents(whole, [None])


def _gradients(
    model: TextToLatents, batch: dict[str, mx.array], key: mx.array, *, shares: tuple[float, ...]
) -> Callable[[], None]:
    step = ElasticStep(shares, 1.0)
    compiled = mx.compile(
        lambda batch, key: Flow().gradients(model, batch, key, step), inputs=[model.state]
    )
    return lambda: mx.eval(compiled(batch, key))


def _update(model: TextToLatents, config: TrainingConfig) -> Callable[[], None]:
    """Updates with gradients of a thousandth of the weights."""
    copy = _model(model.config.transformer)
    copy.update(model.parameters())
    optimizers = Optimizers(config, [Role("model")])
    optimizers.init(copy.trainable_parameters())
    state = [copy.state, optimizers.state]

    def update(step: mx.array) -> dict[str, mx.array]:
        grads = tree_map(lambda p: 1e-3 * p, copy.trainable_parameters())
        return optimizers.update(copy, grads, step=step)

    compiled = mx.compile(update, inputs=state, outputs=state)

    def run() -> None:
        mx.eval(compiled(mx.array(0)), state)

    return run


class _Jpegs:
    """A source of pictures that are decoded and fitted, as those of a user's folder are."""

    def __init__(self, side: int):
        self._size = (side, side)
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        picture = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "JPEG")
        self._data = file.getvalue()

    def batch(self, number: int, count: int) -> tuple[np.ndarray, list[str]]:
        """The same pictures for every number."""
        pictures = [fit(decode(self._data)[0], self._size) for _ in range(count)]
        return np.stack(pictures), [""] * count


def measure_reading(
    step: Callable[[], Any], *, side: int, batch_size: int, repeats: int
) -> dict[str, float]:
    """Mean seconds to read a batch of JPEGs of 1024 x 768 pixels, and that `step`s wait for it.

    Args:
        step: is called between two batches, while the next ones are read ahead.
        side: of the fitted pictures in pixels.
    """
    source = _Jpegs(side)
    start = time.perf_counter()
    for number in range(repeats):
        source.batch(number, batch_size)
    found = {"read": (time.perf_counter() - start) / repeats, "wait": 0.0}
    ahead = Prefetched(source)
    for number in range(1 + repeats):
        start = time.perf_counter()
        ahead.batch(number, batch_size)
        if number > 0:  # nothing was read ahead of the first
            found["wait"] += (time.perf_counter() - start) / repeats
        step()
    ahead.close()
    return found
