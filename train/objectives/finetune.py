"""Fine-tuning of a LoRA by flow matching with prior preservation, one width in a step.

Prior preservation limits forgetting (DreamBooth, arXiv 2208.12242, section 3.2, but with the
model's velocity instead of its samples as the target). Prior samples are the model's own pictures
of other prompts. On them, the network with the LoRA learns the velocity that it predicts without
the LoRA.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_snapgen.lora.adapters import active_adapters
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import TextStates
from train.data.source import Batch
from train.data.streams import Stream
from train.objectives.base import LossObjective, Metrics, ShareStep
from train.objectives.elastic import noisy
from train.objectives.losses import per_sample


@dataclass(frozen=True)
class FineTuning(LossObjective[EfficientDiT, ShareStep]):
    """Velocity losses on pictures and on prior samples. An `Objective`.

    A batch holds `latents` (B, H, W, C), and for text encoder i `states_i` (B, L, D) and `mask_i`
    (B, L); with prior samples also the same arrays of these, with the prefix `prior_`.

    Attributes:
        shift: timestep shift.
        prior_weight: of the prior samples' loss.
        early: see `noisy`.
    """

    shift: float
    prior_weight: float
    early: float = 0.0

    def loss(
        self, model: EfficientDiT, batch: Batch, key: mx.array, step: ShareStep
    ) -> tuple[mx.array, Metrics]:
        """See `LossObjective`."""
        keys, share = mx.random.split(key), step.share
        x_t, t, v = noisy(batch["latents"], keys[0], shift=self.shift, early=self.early)
        diffusion = per_sample(velocity(model, batch, x_t, t=t, share=share) - v).mean()
        metrics = {f"loss_{share:g}": diffusion}
        if "prior_latents" not in batch:
            return diffusion, metrics
        prior = batch["prior_latents"]
        x_t, t, _ = noisy(prior, keys[1], shift=self.shift, early=self.early)
        with active_adapters(model):
            before = velocity(model, batch, x_t, t=t, share=share, part="prior_")
        change = velocity(model, batch, x_t, t=t, share=share, part="prior_")
        change = change - mx.stop_gradient(before)
        metrics[f"prior_{share:g}"] = per_sample(change).mean()
        return diffusion + self.prior_weight * metrics[f"prior_{share:g}"], metrics


@dataclass(frozen=True)
class PublicFineTuning(LossObjective[nn.Module, None]):
    """The velocity loss of a public model on pictures. An `Objective`.

    A batch holds `latents` (B, H, W, C), `text` (B, L, D) and `mask` (B, L).
    """

    def loss(
        self, model: nn.Module, batch: Batch, key: mx.array, step: None
    ) -> tuple[mx.array, Metrics]:
        """See `LossObjective`. The noise levels follow the resolution."""
        x_t, t, v = noisy(batch["latents"], key, shift=None)
        found = model(x_t, t, batch["text"], batch["mask"])
        loss = per_sample(found - v).mean()
        return loss, {"loss": loss}


def velocity(
    network: EfficientDiT,
    batch: Batch,
    x_t: mx.array,
    *,
    t: mx.array,
    share: float,
    part: str = "",
) -> mx.array:
    """The network's velocity for the captions of one `part` of a batch."""
    states = [
        TextStates(batch[f"{part}states_{i}"].astype(network.dtype), batch[f"{part}mask_{i}"])
        for i in range(len(network.text))
    ]
    return network(x_t, t, *network.encode_text(states), share=share)


def step_share(shares: Sequence[float], *, seed: int, step: int) -> float:
    """The random share of a step: 1 with probability 1/2 if `shares` has it, else another one."""
    rng = Stream.STEP_WIDTHS.generator(seed, step)
    others = [share for share in shares if share != 1.0]
    if 1.0 in shares and (not others or rng.random() < 0.5):
        return 1.0
    return float(rng.choice(others))
