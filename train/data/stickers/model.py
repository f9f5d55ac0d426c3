"""Sizes of the default models, which are trained on sticker scenes."""

import dataclasses

from mlx_snapgen.config import ModelConfig, SamplerConfig, TextEncoderConfig
from mlx_snapgen.presets import FLUENT_AUTOENCODER, transformer_preset
from train.data.stickers.vocabulary import FLUENT, NOTO

STICKERS = ModelConfig(
    name="stickers",
    image_size=NOTO.size,
    trained_sizes=tuple(NOTO.shapes),
    transformer=transformer_preset("stickers"),
    text_encoders=(TextEncoderConfig(),),
    sampler=SamplerConfig(guidance_scale=2.0, time_shift=4.0),
)
FLUENT_STICKERS = dataclasses.replace(
    STICKERS,
    name="fluent",
    image_size=FLUENT.size,
    trained_sizes=tuple(FLUENT.shapes),
    transformer=transformer_preset("fluent"),
    autoencoder=FLUENT_AUTOENCODER,
    text_encoders=(TextEncoderConfig(max_length=32),),
)
"""256 px, transparent ground, and as many tokens as STICKERS has."""
