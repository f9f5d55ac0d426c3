"""Inputs and velocities of a network along its sampling trajectories."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import picture_bar
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.sampling import DENOISING, Progress
from train.data.encoded import rows
from train.data.source import Batch
from train.data.streams import Stream

CHUNK = 8  # pictures drawn at a time


class Trajectories:
    """Batches of a model's velocities on its own trajectories, with and without the prompt.

    Args:
        components: the model; it samples when this object is created, not when batches are made.
        captions: one picture is sampled for each.
        shares: of the network's width, to draw with.
        first_seed: seed of the first picture; the next pictures have the next seeds.
        share_of: number of a batch -> its share.
    """

    def __init__(
        self,
        components: Components,
        captions: Sequence[str],
        shares: Sequence[float],
        *,
        batch_size: int = 16,
        seed: int = 0,
        first_seed: int = 0,
        share_of: Callable[[int], float] = lambda number: 1.0,
    ):
        self.batch_size, self.seed, self.share_of = batch_size, seed, share_of
        encoders, network = components.text_encoders, components.transformer
        chunks = [captions[k : k + CHUNK] for k in range(0, len(captions), CHUNK)]
        # Row 0 is the unconditional text, for guidance.
        texts = [[components.config.unconditional_prompt], *chunks]
        encoded = [encode_prompts(some, encoders, transformer=network) for some in texts]
        self.text, self.mask = (mx.concatenate(list(x)) for x in zip(*encoded, strict=True))
        mx.eval(self.text, self.mask)
        self.states: dict[float, Batch] = {}
        total = len(captions) * len(shares)
        with picture_bar(total, "trajectories", leave=True) as progress:
            for share in shares:
                states: list[Batch] = []
                for k, some in enumerate(chunks):
                    numbers = range(k * CHUNK, k * CHUNK + len(some))
                    states += _seen(
                        components,
                        some,
                        first_seed,
                        share=share,
                        numbers=numbers,
                        progress=progress,
                    )
                self.states[share] = {
                    name: mx.concatenate([state[name] for state in states]) for name in states[0]
                }
                mx.eval(self.states[share])

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; it depends on the number alone."""
        states = self.states[self.share_of(number)]
        rng = Stream.TRAJECTORIES.generator(self.seed, number)
        return self.rows(states, rng.integers(len(states["t"]), size=self.batch_size).tolist())

    def rows(self, states: Batch, chosen: Sequence[int]) -> Batch:
        """`x_t` and `v` (B, h, w, C), `t` (B,), `text` (B, L, D) and `mask` (B, L)."""
        batch = rows(states, chosen)
        prompt = batch.pop("prompt")
        return batch | {"text": self.text[prompt], "mask": self.mask[prompt]}

    def error(self, network: EfficientDiT, share: float) -> float:
        """Mean squared error of a network's velocity over all samples at `share`."""
        states, total = self.states[share], 0.0
        count = len(states["t"])
        for start in range(0, count, 32):
            batch = self.rows(states, range(start, min(start + 32, count)))
            v = network(batch["x_t"], batch["t"], batch["text"], batch["mask"], share=share)
            total += float((v - batch["v"]).square().mean(axis=(1, 2, 3)).sum())
        return total / count


def _seen(
    components: Components,
    captions: Sequence[str],
    first_seed: int,
    *,
    share: float,
    numbers: Sequence[int],
    progress: Progress,
) -> list[Batch]:
    """Inputs and velocities of the transformer, step by step, while it draws pictures `numbers`."""
    states: list[Batch] = []
    prompts = mx.array([number + 1 for number in numbers])

    def watched(x_t: mx.array, t: mx.array, text: mx.array, mask: mx.array, **settings):
        v = components.transformer(x_t, t, text, mask, **settings)
        guided = len(x_t) > len(prompts)
        prompt = mx.concatenate([mx.zeros_like(prompts), prompts]) if guided else prompts
        states.append({"x_t": x_t, "t": t, "v": v, "prompt": prompt})
        return v

    seeds = [first_seed + number for number in numbers]
    mx.eval(
        draw_latents(
            components, captions, seeds=seeds, share=share, network=watched, progress=progress
        )
    )
    progress(len(captions) * (1 - DENOISING))
    return states
