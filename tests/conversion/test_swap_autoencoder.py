"""Model folders with another autoencoder."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from convert.autoencoder import swap_autoencoder
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.qwen_image import QwenAutoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.autoencoders.taehv import TinyAutoencoder
from mlx_snapgen.pipeline import SnapGenPipeline
from tests.tiny import QWEN_AUTOENCODER, TAEHV, randomize


@pytest.mark.parametrize("config", [QWEN_AUTOENCODER, TAEHV], ids=lambda config: config.kind)
def test_a_model_draws_with_it(model_folder, tmp_path, config):
    model = randomize(make_autoencoder(config), 0)
    swap_autoencoder(model_folder, model, tmp_path / "model")
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "model")
    assert pipe.autoencoder.config == config
    settings = {"height": 32, "width": 64, "num_inference_steps": 1, "guidance_scale": 1}
    last = list(pipe.generate("a red car", **settings))[-1]
    expected = mx.round((mx.clip(model.decode(last.x0), -1, 1) + 1) * 127.5)[0]
    np.testing.assert_array_equal(np.array(last.preview()), np.array(expected.astype(mx.uint8)))
    assert pipe.autoencoder.encode(model.decode(last.x0)).shape == last.x0.shape
    with pytest.raises(UserError, match="exists already"):
        swap_autoencoder(model_folder, model, tmp_path / "model")


def test_a_model_of_other_latents_is_refused(model_folder, tmp_path):
    config = dataclasses.replace(TAEHV, latent_channels=8)
    with pytest.raises(UserError, match="4 latent channels, the autoencoder gives 8"):
        swap_autoencoder(model_folder, TinyAutoencoder(config), tmp_path / "model")


def test_config_mistakes_are_named(model_folder, tmp_path):
    with pytest.raises(UserError, match=r"encoder_channels .*need four numbers each"):
        QwenAutoencoder(dataclasses.replace(QWEN_AUTOENCODER, encoder_channels=(8, 16)))
    swap_autoencoder(model_folder, QwenAutoencoder(QWEN_AUTOENCODER), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"qwen-image"', '"qwen"'))
    with pytest.raises(UserError, match="unknown autoencoder kind 'qwen', known: convolutional"):
        load_pretrained(tmp_path / "model")
