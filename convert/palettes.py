"""Palettes for the weights of a network: 4 bits or 8, by what each layer loses (section 6).

A weight becomes indices into a palette of 16 or 256 numbers, found by k-means. How sensitive a
layer is, is the mean squared error of its own output when it alone has 16, over calibration
prompts; the worst get 256, as many as the asked average allows. Norms, biases, modulation and RoPE
tables are no layers, and stay as they are.

The networks are those of `torch_dit`. Their weights are set to the numbers of the palettes, so that
what runs in PyTorch is what the package holds.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx_snapgen  # noqa: F401  before mlx, so that the fast BLAS gets in first

# isort: split
import mlx.core as mx
import numpy as np

from mlx_snapgen.errors import UserError
from mlx_snapgen.sampler import denoise, get_noise, get_schedule, guided_velocity
from mlx_snapgen.text_encoder import encode_prompts
from mlx_snapgen.weights import Components

# isort: split
import torch
import torch.nn.functional as F
from torch import nn

LOW, HIGH = 4, 8
"""Bits of an index, of most layers and of the sensitive ones."""

LEAST = 2048
"""Layers of fewer weights stay as they are: a palette of 256 numbers would not pay."""

MOST_STEPS = 8
"""Steps of a calibration picture, fewer than those of a model that samples in many."""

PROMPTS = (
    "a red apple",
    "a portrait of an old fisherman, soft light",
    "a city street at night in the rain",
    "a watercolour of mountains above a lake",
)


def k_means(values: np.ndarray, clusters: int) -> np.ndarray:
    """At most `clusters` centres of numbers, sorted: Lloyd's algorithm, in one dimension.

    Sorted values and their running sums make a round cost no more than a search for each border.
    """
    values = np.sort(values.ravel()).astype(np.float64)
    if len(distinct := np.unique(values)) <= clusters:
        return distinct
    sums = np.concatenate([[0], np.cumsum(values)])
    centres = _first_centres(values, clusters)
    for _ in range(100):
        borders = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        borders = np.concatenate([[0], borders, [len(values)]])
        counts = np.diff(borders)
        before, centres = centres, (np.diff(sums[borders]) / np.maximum(counts, 1))[counts > 0]
        if np.array_equal(centres, before):
            break
    return centres


def _first_centres(values: np.ndarray, clusters: int) -> np.ndarray:
    """Centres to start from: the best of a histogram, or for many a density that is nearly it."""
    bins = 512
    counts, edges = np.histogram(values, bins)
    if clusters > 2**LOW:
        # The best density of many centres is the cube root of that of the values (Panter, Dite).
        smooth = np.convolve(counts, np.full(16, 1 / 16), "same")
        density = np.cumsum(np.cbrt(smooth))
        places = (np.arange(clusters) + 0.5) / clusters * density[-1]
        return np.interp(places, np.concatenate([[0], density]), edges)
    middles = (edges[1:] + edges[:-1]) / 2
    n, s, q = (
        np.concatenate([[0], np.cumsum(counts * power)]) for power in (1, middles, middles**2)
    )
    # Squared error of bins i to j - 1 around their mean; no cluster ends before it starts.
    size = np.maximum(n[None] - n[:, None], 1)
    cost = q[None] - q[:, None] - (s[None] - s[:, None]) ** 2 / size
    cost[np.tril_indices(bins + 1, -1)] = np.inf
    best, starts = cost[0], []
    for _ in range(clusters - 1):
        total = best[:, None] + cost
        starts.append(total.argmin(0))
        best = total.min(0)
    borders = [bins]
    for start in reversed(starts):
        borders.append(start[borders[-1]])
    borders = np.array([0, *borders[-1:0:-1], bins])
    kept = np.diff(n[borders]) > 0
    return (np.diff(s[borders])[kept]) / np.diff(n[borders])[kept]


def palettized(weight: torch.Tensor, bits: int, half: bool = True) -> torch.Tensor:
    """`weight` with each number replaced by the nearest of a palette of 2^bits.

    Args:
        half: the numbers of the palette are fp16's.
    """
    values = weight.detach().numpy()
    palette = k_means(values, 2**bits)
    if half:
        palette = np.unique(palette.astype(np.float16))
    palette = palette.astype(np.float32)
    nearest = np.searchsorted((palette[1:] + palette[:-1]) / 2, values)
    return torch.from_numpy(palette[nearest])


def layers(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Path -> linear layer or convolution with weights worth a palette."""
    return {
        path: module
        for path, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= LEAST
    }


def sensitivities(network: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Path of each layer that `run` uses -> MSE of its output when it alone has `LOW` bits.

    Args:
        run: calls `network` with the inputs to calibrate on.
    """
    sums: dict[str, list[float]] = {}
    hooks = []
    for path, layer in layers(network).items():
        delta = palettized(layer.weight, LOW) - layer.weight

        def measure(layer, inputs, _, path=path, delta=delta):
            error = F.conv2d(inputs[0], delta, None, layer.stride, layer.padding)
            sums.setdefault(path, []).append(error.square().mean().item())

        hooks.append(layer.register_forward_hook(measure))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: float(np.mean(errors)) for path, errors in sums.items()}


def choose_bits(
    errors: Mapping[str, float], sizes: Mapping[str, int], average: float
) -> dict[str, int]:
    """Bits of each layer, at most `average` over all weights.

    Args:
        errors: what `sensitivities` gives.
        sizes: path -> number of weights.
        average: from `LOW` to `HIGH`.

    Raises:
        UserError: another average.
    """
    if not LOW <= average <= HIGH:
        raise UserError(f"weights take {LOW} to {HIGH} bits on average, not {average:g}")
    bits = dict.fromkeys(errors, LOW)
    left = (average - LOW) * sum(sizes[path] for path in errors)
    for path in sorted(errors, key=errors.__getitem__, reverse=True):
        cost = (HIGH - LOW) * sizes[path]
        if cost <= left:
            bits[path], left = HIGH, left - cost
    return bits


def palettize(
    layers: Mapping[str, Sequence[nn.Conv2d]], bits: Mapping[str, int], half: bool = True
) -> tuple[int, float]:
    """Give the layers at these paths palettes, in place; one for each tile of `LEAST` weights.

    Args:
        layers: see `torch_tiles.Layers`.
        bits: what `choose_bits` gives.

    Returns:
        How many palettes there are, and the bits of an index, on average over the weights.
    """
    sizes = []
    for path, count in bits.items():
        for conv in layers[path]:
            if conv.weight.numel() >= LEAST:
                conv.weight.copy_(palettized(conv.weight, count, half))
                sizes.append((conv.weight.numel(), count))
    numbers = sum(n for n, _ in sizes)
    return len(sizes), sum(n * count for n, count in sizes) / max(numbers, 1)


def calibration_prompts(vocabulary: Mapping[str, Sequence[str]] | None) -> list[str]:
    """Prompts that a model can draw: of its vocabulary, if it says one."""
    words = vocabulary or {}
    if not (nouns := words.get("nouns")):
        return list(PROMPTS)
    colours = words.get("colours") or [""]
    chosen = [nouns[i * len(nouns) // 4] for i in range(4)]
    return [" ".join(f"a {colours[i % len(colours)]} {n}".split()) for i, n in enumerate(chosen)]


def draw_with(components: Components, network: nn.Module, prompts: Sequence[str]) -> None:
    """Draw `prompts` with a transformer's twin, in the few or many steps of its model."""
    config = components.config
    sampler = config.sampler_for()
    scale = sampler.guidance_scale
    steps = min(sampler.num_inference_steps, MOST_STEPS)
    side = config.autoencoder.downsampling
    shape = (*(n // side for n in config.image_size), config.transformer.latent_channels)

    def call(x_t: mx.array, t: mx.array, text: mx.array, mask: mx.array) -> mx.array:
        arrays = x_t.transpose(0, 3, 1, 2), t, text.transpose(0, 2, 1)[:, :, None], mask
        with torch.no_grad():
            v = network(*(torch.from_numpy(np.array(array)) for array in arrays))
        return mx.array(v.permute(0, 2, 3, 1).numpy())

    for seed, prompt in enumerate(prompts):
        both = [prompt] if scale == 1 else ["", prompt]
        text, mask = encode_prompts(both, components.text_encoders, components.transformer)
        velocity = guided_velocity(call, text, mask, scale)

        def draw(k: int, seed: int = seed) -> mx.array:
            return get_noise(seed, *shape, k)

        schedule = get_schedule(steps, sampler.time_shift)
        for _ in denoise(velocity, draw(0), schedule, draw if sampler.fresh_noise else None):
            pass
