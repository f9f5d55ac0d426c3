"""How near a network with palettes is to the one without."""

import dataclasses
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.pictures import decibels
from train.data.stickers.vocabulary import known_nouns
from train.data.trajectories import Trajectories
from train.evaluation.previews import Previews
from train.evaluation.score import quick_score
from train.loop.trainer import Trainer

SCORED_STEPS = 14  # of a scored picture at most, as in looks during training


HELD_OUT_SEED = 1_000_000  # of their first picture, away from those that are


def _range(expected: mx.array) -> float:
    """The peak of a PSNR: the range of the numbers expected."""
    return (expected.max() - expected.min()).item()


class Validation:
    """After each checkpoint: how near the velocity is for prompts held out, and pictures."""

    def __init__(self, held_out: Trajectories, widths: Mapping[str, float], previews: Previews):
        self.held_out, self.widths, self.previews = held_out, widths, previews

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        current = trainer.model.trainable_parameters()
        trainer.model.update(trainer.ema_parameters)
        try:
            found = velocity_psnr(trainer.model, self.held_out, self.widths)
        finally:
            trainer.model.update(current)
        return {f"psnr_{name}": value for name, value in found.items()} | self.previews(trainer)


def velocity_psnr(
    network: EfficientDiT, held_out: Trajectories, widths: Mapping[str, float]
) -> dict[str, float]:
    """Name of a width -> dB between the network's velocity and that of the one without palettes."""
    return {
        name: decibels(held_out.error(network, width), _range(held_out.states[width]["v"]))
        for name, width in widths.items()
    }


def compare(
    components: Components,
    networks: Mapping[str, EfficientDiT],
    held_out: Trajectories,
    captions: Sequence[str],
    widths: Mapping[str, float],
    score: int = 0,
) -> str:
    """A markdown table of networks that are to compute what `components` do.

    Args:
        networks: by name.
        captions: drawn for the PSNR of latents, which is that of the median picture: of a mean, one
            picture that turns into another would decide.
        score: prompts of each category of the GenEval-style score; 0 leaves it out.
    """
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + len(captions))
    titles = ["width", "network", "velocity, dB", "latents, dB", *(["score"] if score else [])]
    lines = [titles, ["---", "---"] + ["---:"] * (len(titles) - 2)]
    for name, width in widths.items():
        expected = draw_latents(components, captions, seeds=seeds, share=width)
        for label, network in ({"float32": components.transformer} | dict(networks)).items():
            line = [name, label, "", ""]
            if network is not components.transformer:
                velocity = velocity_psnr(network, held_out, {name: width})[name]
                found = draw_latents(
                    components, captions, seeds=seeds, share=width, network=network
                )
                errors = np.array((found - expected).square().mean(axis=(1, 2, 3)))
                latents = decibels(float(np.median(errors)), _range(expected))
                line = [name, label, f"{velocity:.1f}", f"{latents:.1f}"]
            if score:
                made = dataclasses.replace(components, transformer=network)
                steps = min(SCORED_STEPS, components.config.sampler.num_inference_steps)
                scores = quick_score(made, known_nouns(components), score, steps=steps, share=width)
                line.append(f"{scores['overall']:.3f} ± {scores['overall_error']:.3f}")
            lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def in_float16(network: EfficientDiT) -> EfficientDiT:
    """`network` with its weights rounded to fp16; it computes in float32 as before."""
    made = EfficientDiT(network.config)
    made.update(tree_map(lambda p: p.astype(mx.float16).astype(mx.float32), network.parameters()))
    return made
