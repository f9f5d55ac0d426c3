"""Networks of the paper, of public models and of the default one, by name. Does not import mlx.

Transformers `full`, `small` and `tiny` are the paper's three widths as stand-alone models, and
`supernetwork` holds all three; with -f32 in their names they take the latents of DC-AE. `ladder-a`
to `ladder-d` are the paper's ablation (at the small width). `fluent` is the default model of this
package, and `stickers` the one before it.
"""

import dataclasses

from mlx_snapgen.config import (
    AutoencoderConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from mlx_snapgen.errors import UserError, nearest

# fmt: off
QWEN_IMAGE_AUTOENCODER = AutoencoderConfig(
    kind="qwen-image",
    latent_channels=16,
    encoder_channels=(96, 192, 384, 384),
    decoder_channels=(384, 384, 192, 96),
    encoder_blocks=(2, 2, 2, 2),
    decoder_blocks=(3, 3, 3, 3),
    latents_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latents_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)
# fmt: on
"""Qwen-Image's, the paper's choice (SnapGen++ section 2)."""

FLUX2_AUTOENCODER = AutoencoderConfig(
    kind="flux2",
    latent_channels=32,
    encoder_channels=(128, 256, 512, 512),
    decoder_channels=(512, 512, 256, 128),
    encoder_blocks=(2, 2, 2, 2),
    decoder_blocks=(3, 3, 3, 3),
)
"""FLUX.2's, without its statistics of the latents, which its checkpoint contains."""

DC_AE = AutoencoderConfig(
    kind="dc-ae",
    latent_channels=32,
    encoder_channels=(128, 256, 512, 512, 1024, 1024),
    decoder_channels=(1024, 1024, 512, 512, 256, 128),
    encoder_blocks=(2, 2, 2, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 3, 3, 3),
    latents_mean=(0.0,) * 32,
    latents_std=(1 / 0.41407,) * 32,
)
"""SANA's deep compression autoencoder (arXiv 2410.10629)."""

PIXELS = AutoencoderConfig(
    kind="pixels",
    latent_channels=3,
    encoder_channels=(),
    decoder_channels=(),
    encoder_blocks=(),
    decoder_blocks=(),
    latents_mean=(0.0,) * 3,
    latents_std=(2.0,) * 3,
)
"""MiniT2I's: it draws pixels, and its noise has a standard deviation of 2."""

FLUENT_AUTOENCODER = AutoencoderConfig(
    latent_channels=32,
    encoder_channels=(64, 128, 192),
    decoder_channels=(256, 192, 96, 32),
    encoder_blocks=(1, 2, 2),
    decoder_blocks=(2, 2, 2, 1),
    picture_channels=4,
)
"""For RGBA pictures of 256 pixels: 16 x 16 latents."""

TAEW2_1 = AutoencoderConfig(
    kind="taehv",
    latent_channels=16,
    encoder_channels=(64, 64, 64, 64),
    decoder_channels=(256, 128, 64, 64),
    encoder_blocks=(3, 3, 3),
    decoder_blocks=(3, 3, 3),
)
"""The public tiny autoencoder of the same latents; it takes the normalized ones."""

TINYCLIP_19M = TextEncoderConfig(
    kind="clip",
    vocab_size=49408,
    hidden_size=512,
    num_layers=6,
    num_heads=8,
    max_length=77,
    activation="gelu",
)
"""The text tower of TinyCLIP ViT-39M/16 Text-19M, one of the paper's two (section 2)."""

GEMMA_3_4B = TextEncoderConfig(
    kind="gemma",
    vocab_size=262208,
    hidden_size=2560,
    num_layers=34,
    num_heads=8,
    max_length=300,
    source="mlx-community/gemma-3-4b-it-4bit",
)
"""Gemma-3-4b-it, the paper's other text encoder; 300 tokens as in SANA (arXiv 2410.10629)."""

FOUR_STEPS = SamplerConfig(4, guidance_scale=1.0, time_shift=3.0)
"""The sampler of a model distilled by SnapGen++'s step distillation (section 3.3)."""

_LADDER_B = TransformerConfig(
    hidden_size=1024,
    num_kv_heads=1,
    blocks=(6, 14, 8),
    ffn_ratio=(3.0, 3.0, 3.0),
    sparse_attention=False,
    long_skips=False,
    widths=(1.0,),
)

TRANSFORMERS: dict[str, TransformerConfig] = {
    "supernetwork": TransformerConfig(),
    "full": TransformerConfig().standalone(1.0),
    "small": TransformerConfig().standalone(0.5),
    "tiny": TransformerConfig().standalone(0.375),
    "ladder-a": dataclasses.replace(_LADDER_B, blocks=(28, 0, 0)),
    "ladder-b": _LADDER_B,
    "ladder-c": dataclasses.replace(_LADDER_B, sparse_attention=True),
    "ladder-d": TransformerConfig().standalone(0.5),
    "stickers": TransformerConfig(
        hidden_size=256,
        head_dim=32,
        num_kv_heads=8,
        num_cross_kv_heads=4,
        blocks=(1, 6, 2),
        num_bands=4,
        latent_channels=8,
        text_dims=(256,),
        text_width=256,
    ),
}
TRANSFORMERS["fluent"] = dataclasses.replace(
    TRANSFORMERS["stickers"], latent_channels=32, prediction="x0"
)
TRANSFORMERS |= {
    f"{name}-f32": dataclasses.replace(
        TRANSFORMERS[name], patch_size=1, num_bands=8, latent_channels=32
    )
    for name in ("supernetwork", "full", "small", "tiny")
}
"""Transformer presets by name.

Those named -f32 take the latents of DC-AE, one token for each: a quarter of the others' tokens. As
there, a band has four rows of tokens at 1024 pixels.
"""


def preset_autoencoder(name: str) -> AutoencoderConfig:
    """The public autoencoder whose latents the named transformer preset takes."""
    if name == "fluent":
        return FLUENT_AUTOENCODER
    return DC_AE if name.endswith("-f32") else QWEN_IMAGE_AUTOENCODER


def transformer_preset(name: str) -> TransformerConfig:
    """The named transformer preset; `UserError` with the nearest name when there is none."""
    if name not in TRANSFORMERS:
        raise UserError(f"no preset '{name}'{nearest(name, TRANSFORMERS)}")
    return TRANSFORMERS[name]
