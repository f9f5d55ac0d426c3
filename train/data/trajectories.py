"""What a model's network is asked and says on its way from noise to pictures, to learn from."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.draw import draw_latents
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from train.data.source import Batch
from train.objectives.losses import per_sample

CHUNK = 8  # pictures drawn at a time


class Trajectories:
    """The velocities along a model's own way, guidance's both halves, as batches.

    Args:
        components: the model; drawn with here, and not afterwards.
        captions: what to draw, one picture each.
        widths: the widths to draw with.
        first_seed: noise of the first picture, the others' follow.
        width_of: number of a batch -> its width.
    """

    def __init__(
        self,
        components: Components,
        captions: Sequence[str],
        widths: Sequence[float],
        batch_size: int = 16,
        seed: int = 0,
        first_seed: int = 0,
        width_of: Callable[[int], float] = lambda number: 1.0,
    ):
        self.batch_size, self.seed, self.width_of = batch_size, seed, width_of
        network = components.transformer
        chunks = [captions[k : k + CHUNK] for k in range(0, len(captions), CHUNK)]
        encoded = [
            encode_prompts(some, components.text_encoders, transformer=network)
            for some in [[""], *chunks]
        ]
        # Row 0 is the empty prompt, which guidance asks for.
        self.text, self.mask = (mx.concatenate(list(x)) for x in zip(*encoded, strict=True))
        mx.eval(self.text, self.mask)
        self.states: dict[float, Batch] = {}
        with tqdm(total=len(captions) * len(widths), desc="the model draws", unit="picture") as bar:
            for width in widths:
                states: list[Batch] = []
                for k, some in enumerate(chunks):
                    rows = range(k * CHUNK, k * CHUNK + len(some))
                    states += _seen(components, some, [first_seed + r for r in rows], width, rows)
                    bar.update(len(some))
                self.states[width] = {
                    name: mx.concatenate([state[name] for state in states]) for name in states[0]
                }
                mx.eval(self.states[width])

    def __call__(self, number: int) -> Batch:
        """Batch `number` of the stream; the same whenever it is asked for."""
        states = self.states[self.width_of(number)]
        rng = np.random.default_rng((self.seed, number, 8))
        return self.rows(states, rng.integers(len(states["t"]), size=self.batch_size).tolist())

    def rows(self, states: Batch, chosen: Sequence[int]) -> Batch:
        """`x_t` and `v` (B, h, w, C), `t` (B,), `text` (B, L, D) and `mask` (B, L)."""
        batch = {name: value[mx.array(list(chosen))] for name, value in states.items()}
        prompt = batch.pop("prompt")
        return batch | {"text": self.text[prompt], "mask": self.mask[prompt]}

    def error(self, network: EfficientDiT, width: float) -> float:
        """Mean squared error of a network's velocity over all that was drawn at `width`."""
        states, sums = self.states[width], 0.0
        count = len(states["t"])
        for start in range(0, count, 32):
            batch = self.rows(states, range(start, min(start + 32, count)))
            v = network(batch["x_t"], batch["t"], batch["text"], batch["mask"], share=width)
            sums += per_sample(v - batch["v"]).sum().item()
        return sums / count


def _seen(
    components: Components,
    captions: Sequence[str],
    seeds: Sequence[int],
    width: float,
    rows: Sequence[int],
) -> list[Batch]:
    """What the transformer was asked and said, step by step, while it drew."""
    states: list[Batch] = []
    prompts = mx.array([row + 1 for row in rows])

    def watched(x_t: mx.array, t: mx.array, text: mx.array, mask: mx.array, **settings):
        v = components.transformer(x_t, t, text, mask, **settings)
        guided = len(x_t) > len(prompts)
        prompt = mx.concatenate([mx.zeros_like(prompts), prompts]) if guided else prompts
        states.append({"x_t": x_t, "t": t, "v": v, "prompt": prompt})
        return v

    mx.eval(draw_latents(components, captions, seeds=seeds, share=width, network=watched))
    return states
