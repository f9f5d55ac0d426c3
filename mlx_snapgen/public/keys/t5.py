"""The weights of a T5 in transformers' format; the names here are the same."""

from mlx_snapgen.checkpoint.module import shapes
from mlx_snapgen.networks.text_encoders.t5 import T5Encoder
from mlx_snapgen.public.keymap import KeyMap, Row, numberless, same
from mlx_snapgen.public_config import T5Config

T5_KEYS = KeyMap(
    "T5",
    *map(same, numberless(shapes(T5Encoder(T5Config(num_layers=2)).parameters()))),
    Row("encoder.embed_tokens.weight", None),
    Row("decoder.**", None),
    Row("lm_head.weight", None),
)
"""The ignored embedding is a copy of `shared.weight`."""
