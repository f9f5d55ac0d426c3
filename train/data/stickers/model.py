"""Sizes of the default model, which is trained on sticker scenes."""

from mlx_snapgen.config import (
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    transformer_preset,
)
from train.data.stickers.source import SIZE

STICKERS = ModelConfig(
    name="stickers",
    image_size=SIZE,
    trained_sizes=(SIZE,),
    transformer=transformer_preset("stickers"),
    text_encoders=(TextEncoderConfig(),),
    sampler=SamplerConfig(guidance_scale=2.0, time_shift=4.0),
)
