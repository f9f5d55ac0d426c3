"""What fine-tuning is made of: the step, the encoded pictures, the estimate and the validation.

A LoRA learns pictures by flow matching, one width in a step. What the model knew is kept by prior
preservation (DreamBooth, arXiv 2208.12242, section 3.2, with the model's own velocity in place of
its samples as the target): on pictures that the model has drawn of prompts it knows, the network
with the LoRA is to predict what it predicts without.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_snapgen.lora.adapters import acting
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.base import TextStates
from train.data.source import Batch
from train.objectives.elastic import noisy
from train.objectives.losses import per_sample

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
    return network(x_t, t, *network.encode_text(states), share=width)


def step_width(widths: Sequence[float], seed: int, step: int) -> float:
    """The width of a step: full every other time, if it is among them, else any other."""
    rng = np.random.default_rng((seed, step, 6))
    others = [width for width in widths if width != 1.0]
    if 1.0 in widths and (not others or rng.random() < 0.5):
        return 1.0
    return float(rng.choice(others))


# --- data ---------------------------------------------------------------------------------------


# --- before and during the run ------------------------------------------------------------------
