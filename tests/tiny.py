"""Tiny configs, models and random weights for all tests."""

import dataclasses
import functools
import io
import itertools
import os
import re
from pathlib import Path

import mlx_snapgen  # noqa: F401  before mlx, which otherwise links its slow reference BLAS

# isort: split
import mlx.core as mx
import sentencepiece
from mlx.utils import tree_flatten, tree_unflatten

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.checkpoint.text_encoders import new_text_encoder
from mlx_snapgen.config import (
    AutoencoderConfig,
    ModelConfig,
    QwenTransformerConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
    ZImageTransformerConfig,
)
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.clip import ClipTextEncoder, ClipTokenizer
from mlx_snapgen.networks.text_encoders.sentencepiece import SentencePieceTokenizer

NOUNS = ["apple", "car", "cat", "ice cream cone"]
COLORS = ["red", "blue", "green"]
VOCAB_SIZE = 64


def randomize(module, seed: int) -> None:
    """Normal weights everywhere, so that layers that start at zero take part."""
    flat = tree_flatten(module.parameters())
    keys = mx.random.split(mx.random.key(seed), len(flat))
    values = []
    for key, (name, p) in zip(keys, flat, strict=True):
        if p.ndim == 1 and re.search(r"norm\d?(\.members\.\d)?\.weight", name):
            value = 1 + 0.1 * mx.random.normal(p.shape, key=key)
        else:
            scale = 0.1 if p.ndim == 1 else (p.size // p.shape[0]) ** -0.5
            value = scale * mx.random.normal(p.shape, key=key)
        values.append((name, value))
    module.update(tree_unflatten(values))
    mx.eval(module.parameters())


TEXT = TextEncoderConfig(
    vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, max_length=20
)
TRANSFORMER = TransformerConfig(
    hidden_size=64,
    head_dim=8,
    num_kv_heads=8,
    num_cross_kv_heads=4,
    blocks=(1, 2, 1),
    num_bands=2,
    latent_channels=4,
    text_dims=(32, 16),
    text_width=32,
    frequency_dim=32,
)
AUTOENCODER = AutoencoderConfig(
    latent_channels=4,
    encoder_channels=(8, 16),
    decoder_channels=(16, 8, 8),
    encoder_blocks=(1, 1),
    decoder_blocks=(1, 1, 1),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.0, 0.9, 1.1, 1.2),
)
MODEL = ModelConfig(
    name="random",
    image_size=(32, 64),
    transformer=TRANSFORMER,
    autoencoder=AUTOENCODER,
    text_encoders=(dataclasses.replace(TEXT, hidden_size=32, max_length=16), TEXT),
    sampler=SamplerConfig(num_inference_steps=2, guidance_scale=3.0, time_shift=2.0),
)
"""Two text encoders and all three widths."""
QWEN = QwenTransformerConfig(
    num_layers=2, num_heads=2, head_dim=16, latent_channels=4, text_dims=24, rope_axes=(4, 6, 6)
)
Z_IMAGE = ZImageTransformerConfig(
    num_layers=2,
    num_refiner_layers=1,
    hidden_size=48,
    num_heads=3,
    latent_channels=4,
    text_dims=24,
    time_dims=48,
    rope_axes=(4, 6, 6),
)


@functools.cache
def tokenizer_bytes() -> bytes:
    """A sentencepiece model of `VOCAB_SIZE` tokens."""
    pairs = itertools.product(COLORS, NOUNS, COLORS, NOUNS)
    captions = [f"a {a} {b} next to a {c} {d}" for a, b, c, d in pairs]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions[:60]),
        model_writer=model,
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        required_chars="abcdefghijklmnopqrstuvwxyz",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def make_components(config: ModelConfig = MODEL) -> Components:
    """A model with random weights everywhere."""
    tokenizer = tokenizer_bytes()
    made = Components(
        config=config,
        transformer=EfficientDiT(config.transformer),
        autoencoder=make_autoencoder(config.autoencoder),
        text_encoders=[
            new_text_encoder(c, SentencePieceTokenizer(tokenizer, c.max_length))
            for c in config.text_encoders
        ],
        vocabulary={"nouns": NOUNS, "other_words": ["apples", "automobile"], "colours": COLORS},
    )
    for seed, module in enumerate(made.modules().values()):
        randomize(module, seed)
    return made


def make_clip(merges: bytes, hidden_size: int, *, num_heads: int) -> ClipTextEncoder:
    """A CLIP of three layers over these merges, with random weights."""
    tokenizer = ClipTokenizer(merges, 17)
    config = TextEncoderConfig(
        kind="clip",
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        num_layers=3,
        num_heads=num_heads,
        max_length=17,
        activation="gelu",
    )
    made = ClipTextEncoder(config, tokenizer)
    randomize(made, 5)
    return made


def memory(pid):
    """MiB of a process and its children; on Linux only."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    pages = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
