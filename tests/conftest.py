"""What the tests share: above all a tiny random model in the full format."""

import io
import itertools
from pathlib import Path

# Before mlx, so that the fast BLAS gets in first.
import mlx_snapgen  # noqa: F401

# isort: split
import pytest
import sentencepiece

from mlx_snapgen.checkpoint.model import Components, save_pretrained
from mlx_snapgen.config import (
    AutoencoderConfig,
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
)
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.convolutional import ConvolutionalAutoencoder
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.text_encoders.sentencepiece import (
    SentencePieceTokenizer,
    TransformerTextEncoder,
)
from tests.tiny import COLOURS, NOUNS, VOCAB_SIZE, randomise
from train.data.stickers.render import find_font


@pytest.fixture(scope="session")
def font() -> Path:
    try:
        return find_font()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer_bytes() -> bytes:
    pairs = itertools.product(COLOURS, NOUNS, COLOURS, NOUNS)
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


@pytest.fixture(scope="session")
def components(tokenizer_bytes) -> Components:
    """Random weights, two text encoders, all three widths. Tests leave it as it is."""
    encoders = (
        TextEncoderConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, num_layers=1, num_heads=2, max_length=16
        ),
        TextEncoderConfig(
            vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, max_length=20
        ),
    )
    config = ModelConfig(
        name="random",
        image_size=(32, 64),
        transformer=TransformerConfig(
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
        ),
        autoencoder=AutoencoderConfig(
            latent_channels=4,
            encoder_channels=(8, 16),
            decoder_channels=(16, 8, 8),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1, 1),
            latents_mean=(0.1, -0.2, 0.3, 0.0),
            latents_std=(1.0, 0.9, 1.1, 1.2),
        ),
        text_encoders=encoders,
        sampler=SamplerConfig(num_inference_steps=2, guidance_scale=3.0, time_shift=2.0),
    )
    made = Components(
        config=config,
        transformer=EfficientDiT(config.transformer),
        autoencoder=ConvolutionalAutoencoder(config.autoencoder),
        text_encoders=[
            TransformerTextEncoder(c, SentencePieceTokenizer(tokenizer_bytes, c.max_length))
            for c in encoders
        ],
        vocabulary={"nouns": NOUNS, "other_words": ["apples", "automobile"], "colours": COLOURS},
    )
    for seed, module in enumerate(made.modules().values()):
        randomise(module, seed)
    return made


@pytest.fixture(scope="session")
def model_folder(components, tmp_path_factory):
    """`components` on disk. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("model") / "random"
    save_pretrained(folder, components)
    return folder
