"""Palettes for a transformer's weights (SnapGen++ section 6).

A weight becomes indices into a palette of 16 or 256 fp16 numbers, found by k-means;
`mlx_snapgen.quantize.sensitivity` chooses the size. Norms, biases, modulation, RoPE tables and the
text projections, which run only once per picture, have no palette.

A network with palettes is an ordinary `EfficientDiT` whose weights are numbers of the palettes. All
widths share the palettes, because a narrower network's weight is a corner of the wider one's.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_snapgen.checkpoint.module import check_version
from mlx_snapgen.errors import UserError
from mlx_snapgen.lora.adapters import linear_layers
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.reading import read_object

LOW, HIGH = 4, 8
"""Bits of an index, for most layers and for the sensitive ones."""

LEAST = 2048
"""Layers with fewer weights have no palette: one of 256 numbers would save nothing."""

FILE = "palettes.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Palettes:
    """Which layers have palettes, of how many bits.

    Attributes:
        average_bits: upper limit of the average over all weights that have a palette.
        bits: name of a layer -> bits of an index (see `layers`).
        mse: name of a layer -> its sensitivity (see `sensitivity`).
        prompts: the prompts that the sensitivity was measured on.
        widths: names of the widths that the palettes are meant for.
    """

    average_bits: float
    bits: dict[str, int]
    mse: dict[str, float]
    prompts: list[str]
    widths: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        of_layers = {name: {"bits": self.bits[name], "mse": self.mse[name]} for name in self.bits}
        return {
            "average_bits": self.average_bits,
            "widths": self.widths,
            "prompts": self.prompts,
            "layers": of_layers,
        }


# --- palettes -----------------------------------------------------------------------------------


def k_means(values: np.ndarray, clusters: int) -> np.ndarray:
    """At most `clusters` centers of numbers, sorted: Lloyd's algorithm, in one dimension.

    With sorted values and their cumulative sums, a round costs one binary search per border.
    """
    values = np.sort(values.ravel()).astype(np.float64)
    if len(distinct := np.unique(values)) <= clusters:
        return distinct
    sums = np.concatenate([[0], np.cumsum(values)])
    centers = _first_centers(values, clusters)
    for _ in range(100):
        borders = np.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        borders = np.concatenate([[0], borders, [len(values)]])
        counts = np.diff(borders)
        before, centers = centers, (np.diff(sums[borders]) / np.maximum(counts, 1))[counts > 0]
        if np.array_equal(centers, before):
            break
    return centers


def _first_centers(values: np.ndarray, clusters: int) -> np.ndarray:
    """Initial centers: optimal for a histogram of the values, or for many clusters nearly so."""
    bins = 512
    counts, edges = np.histogram(values, bins)
    if clusters > 2**LOW:
        # The best density of many centers is the cube root of that of the values (Panter, Dite).
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


def palettized(weight: mx.array, bits: int) -> mx.array:
    """`weight` with each number replaced by the nearest of a palette of 2^bits fp16 numbers.

    A weight of at most 2^bits different fp16 numbers is returned unchanged.
    """
    values = np.array(weight.astype(mx.float32))
    palette = np.unique(k_means(values, 2**bits).astype(np.float16).astype(np.float32))
    nearest = np.searchsorted((palette[1:] + palette[:-1]) / 2, values)
    return mx.array(palette[nearest])


def layers(network: EfficientDiT) -> dict[str, list[Any]]:
    """Name -> linear layers that have a palette of this name.

    Layers that exist once per width, such as the timestep embedding, share one name; every other
    name has one layer. At a single width the name is that of the layer's PyTorch twin.
    """
    found: dict[str, list[Any]] = {}
    for path, layer in linear_layers(network).items():
        if not path.startswith("text."):
            found.setdefault(re.sub(r"\.members\.\d+", "", path), []).append(layer)
    return {name: some for name, some in found.items() if any(map(is_large, some))}


def is_large(layer: Any) -> bool:
    """Whether a layer's weights are worth a palette."""
    return layer.weight.size >= LEAST


def with_palettes(network: EfficientDiT, bits: Mapping[str, int]) -> EfficientDiT:
    """`network` in float32 with palettes of `bits` for the layers of these names; a copy."""
    made = EfficientDiT(network.config)
    made.update(network.parameters())
    for name, some in layers(made).items():
        for layer in filter(is_large, some if name in bits else ()):
            layer.weight = palettized(layer.weight, bits[name])
    return made


# --- a model with palettes on disk --------------------------------------------------------------


def palettes_file(palettes: Palettes) -> dict[str, str]:
    """Name -> text of the file that `save_pretrained` adds for a network with palettes."""
    values = {"format_version": FORMAT_VERSION} | palettes.to_dict()
    return {FILE: json.dumps(values, indent=1)}


def load_palettes(folder: Path) -> Palettes | None:
    """Palettes of the model in `folder`, None when it has none; `UserError` for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = read_object(path)
        hint = "upgrade it, or run train.palettes again"
        check_version(path, values["format_version"], reads=FORMAT_VERSION, hint=hint)
        of_layers = values["layers"].items()
        bits = {name: int(layer["bits"]) for name, layer in of_layers}
        mse = {name: float(layer["mse"]) for name, layer in of_layers}
        average = float(values["average_bits"])
        found = Palettes(
            average_bits=average,
            bits=bits,
            mse=mse,
            prompts=[str(prompt) for prompt in values["prompts"]],
            widths=[str(width) for width in values["widths"]],
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): run train.palettes again") from None
    if not set(bits.values()) <= {LOW, HIGH}:
        raise UserError(f"{path} has palettes of other than {LOW} and {HIGH} bits")
    return found


def check_palettes(network: EfficientDiT, palettes: Palettes) -> None:
    """`UserError` unless the network's weights hold the numbers of these palettes and no others."""
    of_network = layers(network)
    # Layers of a narrow network may be too small for a palette, so `palettes` may name more.
    if other := sorted(of_network.keys() - palettes.bits.keys()):
        raise UserError(f"{FILE} is of another network: it has no {other[0]}")
    for name, some in of_network.items():
        for layer in filter(is_large, some):
            numbers = np.unique(np.array(layer.weight.astype(mx.float32)))
            most = 2 ** palettes.bits[name]
            if len(numbers) > most or (numbers != numbers.astype(np.float16)).any():
                raise UserError(
                    f"{name} does not hold the {most} numbers of its palette: the weights were "
                    f"changed after {FILE} was written, run train.palettes again"
                )
