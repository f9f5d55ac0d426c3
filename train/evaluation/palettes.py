"""Comparison of a network with palettes with the network without."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.pictures import decibels
from mlx_snapgen.sampling import DENOISING
from train.data.trajectories import Trajectories
from train.evaluation.previews import Previews
from train.loop.trainer import Trainer

HELD_OUT_SEED = 1_000_000  # of the first held-out picture; other seeds than those of training

Score = Callable[[Components, float], str]
"""(model, share) -> a cell of the table: a score of its pictures."""


def _range(expected: mx.array) -> float:
    """The peak value of a PSNR: the range of the expected values."""
    return float(expected.max() - expected.min())


class Validation:
    """After each checkpoint: the PSNR of the velocity for held-out prompts, and pictures."""

    def __init__(
        self,
        network: EfficientDiT,
        held_out: Trajectories,
        *,
        widths: Mapping[str, float],
        previews: Previews,
    ):
        self.network, self.held_out = network, held_out
        self.widths, self.previews = widths, previews

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        with trainer.averaged():
            found = velocity_psnr(self.network, self.held_out, widths=self.widths)
        return {f"psnr_{name}": value for name, value in found.items()} | self.previews(trainer)


def velocity_psnr(
    network: EfficientDiT, held_out: Trajectories, *, widths: Mapping[str, float]
) -> dict[str, float]:
    """Name of a width -> PSNR in dB of the velocity, against the network without palettes."""
    return {
        name: decibels(held_out.error(network, share), _range(held_out.states[share]["v"]))
        for name, share in widths.items()
    }


def compare(
    components: Components,
    networks: Mapping[str, EfficientDiT],
    held_out: Trajectories,
    *,
    captions: Sequence[str],
    widths: Mapping[str, float],
    score: Score | None = None,
) -> str:
    """A markdown table of networks that replace the one of `components`.

    Args:
        networks: by name.
        captions: prompts for the PSNR of latents. The table has the median over pictures, because
            one picture with different content would dominate the mean.
        widths: name -> share.
        score: computes one more column.
    """
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + len(captions))
    titles = ["width", "network", "velocity, dB", "latents, dB", *(["score"] if score else [])]
    lines = [titles, ["---", "---"] + ["---:"] * (len(titles) - 2)]
    named = {"float32": components.transformer} | dict(networks)
    total = len(widths) * len(named) * len(captions)
    with picture_bar(total, "comparison") as progress:

        def draw(share: float, network: EfficientDiT | None = None) -> mx.array:
            return draw_latents(
                components, captions, seeds=seeds, share=share, network=network, progress=progress
            )

        for name, share in widths.items():
            expected = draw(share)
            for label, network in named.items():
                line = [name, label, "", ""]
                if network is not components.transformer:
                    velocity = velocity_psnr(network, held_out, widths={name: share})[name]
                    found = draw(share, network)
                    errors = np.array((found - expected).square().mean(axis=(1, 2, 3)))
                    latents = decibels(float(np.median(errors)), _range(expected))
                    line = [name, label, f"{velocity:.1f}", f"{latents:.1f}"]
                if score:
                    line.append(score(dataclasses.replace(components, transformer=network), share))
                lines.append(line)
                progress(len(captions) * (1 - DENOISING))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_float16(network: EfficientDiT) -> EfficientDiT:
    """`network` with its weights rounded to fp16; it still computes in float32."""
    made = EfficientDiT(network.config)
    made.update(tree_map(lambda p: p.astype(mx.float16).astype(mx.float32), network.parameters()))
    return made
