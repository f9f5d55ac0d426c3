"""Memory of training, by arithmetic from shapes."""

from mlx_snapgen.config import TransformerConfig
from mlx_snapgen.networks.attention import MANY_SCORES, PART_SCORES
from mlx_snapgen.networks.efficient_dit import count_parameters

# Measured with MLX's peak memory on the CPU.
STATE = {"adamw": 16, "muon": 12}
"""Bytes for each parameter of the transformer: weights, averages and moments in float32. AdamW has
two moments. Muon has one for the matrices inside the blocks, which are nearly all of a network."""
UPDATE = 420
"""Bytes of the update, beside state and gradients, for each entry of a hidden x hidden matrix: new
state exists beside the old one in a few layers at a time."""
PARTS = 7
"""Copies of a part's scores (`attention.attend_in_parts`) that exist at a time."""


def training_memory(
    config: TransformerConfig,
    *,
    latents: tuple[int, int],
    batch_size: int,
    save_memory: bool = False,
    sub_networks: int = 0,
    text_tokens: int = 77,
    text_parameters: int = 0,
    compute_bytes: int = 4,
    optimizer: str = "muon",
) -> int:
    """Peak memory in bytes of a training step of the transformer and the trained text encoders.

    Autoencoders, teachers and frozen text encoders come on top.

    Args:
        latents: (height, width) of the latents.
        batch_size: pictures in a micro-batch.
        save_memory: blocks are recomputed in the backward pass.
        sub_networks: number of sub-networks that an elastic step trains beside the full network.
        text_tokens: tokens of all text encoders together.
        text_parameters: parameters of text encoders that are trained too.
        compute_bytes: of a number in the forward and backward pass: 4, or 2 for bfloat16.
        optimizer: of the transformer.
    """
    parameters = count_parameters(config) + text_parameters
    # One tree of gradients for each width, in float32.
    gradients = 4 * (1 + sub_networks) * parameters
    tokens = latents[0] * latents[1] // config.patch_size**2
    stages = zip(config.blocks, (tokens, tokens // 4, tokens), config.ffn_ratio, strict=True)
    inputs, kept, states, scores = 0.0, 0.0, 0.0, 0.0
    for stage, (count, n, ratio) in enumerate(stages):
        sparse = config.sparse_attention and stage != 1
        of_block = _of_block(config, n, text_tokens, ratio=ratio, sparse=sparse)
        inputs += count * batch_size * n * config.hidden_size
        kept += count * batch_size * sum(of_block)
        if count:
            states, scores = (
                max(a, batch_size * b) for a, b in zip((states, scores), of_block, strict=True)
            )
    if save_memory:
        if scores >= MANY_SCORES:
            scores = min(scores, PARTS * PART_SCORES)
        step = gradients + compute_bytes * (inputs + 2 * states + scores)
    else:
        # Activations make room for gradients, block by block.
        held = max(compute_bytes * kept, gradients + compute_bytes * (states + scores))
        step = held + 1.5 * compute_bytes * states
    update = 4 * parameters + UPDATE * config.hidden_size**2
    state = STATE[optimizer] * count_parameters(config) + STATE["adamw"] * text_parameters
    return round(state + max(step, update))


def _of_block(
    config: TransformerConfig, tokens: int, text_tokens: int, *, ratio: float, sparse: bool
) -> tuple[float, float]:
    """Numbers in states and attention scores that a block keeps for one picture."""
    heads, d = config.num_heads, config.hidden_size
    kv = config.num_kv_heads * config.head_dim
    # Norms, modulated inputs, queries in three forms, outputs of the branches and of the layers.
    states = tokens * ((18 if sparse else 15) * d + 6 * kv + 2 * ratio * d)
    keys = text_tokens + tokens
    if sparse:
        span = min(1.0, (2 * config.band_radius + 1) / config.num_bands)
        keys = text_tokens + tokens / 4 + span * tokens
    return states, heads * tokens * keys
