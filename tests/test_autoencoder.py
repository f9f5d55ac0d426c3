"""The autoencoder's layout and normalisation."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.autoencoder import Autoencoder, depth_to_space, space_to_depth
from mlx_snapgen.config import AutoencoderConfig
from mlx_snapgen.errors import UserError

CONFIG = AutoencoderConfig(latent_channels=4, encoder_channels=(8, 16), decoder_channels=(16, 8, 8))


def test_space_to_depth_is_a_strided_convolutions_patches():
    x = mx.random.normal((2, 4, 6, 3))
    kernel = mx.random.normal((5, 2, 2, 3))
    expected = mx.conv2d(x, kernel, stride=2)
    found = space_to_depth(x, 2) @ kernel.reshape(5, -1).T
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)
    np.testing.assert_array_equal(np.array(depth_to_space(space_to_depth(x, 2), 2)), np.array(x))


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
def test_shapes(size):
    model = Autoencoder(CONFIG)
    latents = model.encode(mx.zeros((2, *size, 3)))
    assert latents.shape == (2, size[0] // 8, size[1] // 8, 4)
    assert model.decode(latents).shape == (2, *size, 3)
    with pytest.raises(UserError, match="20x16 pixels does not divide by 8"):
        model.encode(mx.zeros((1, 20, 16, 3)))


def test_latents_are_normalised_and_decoding_undoes_it():
    mx.random.seed(0)
    raw = Autoencoder(CONFIG)
    pictures = mx.random.uniform(-1, 1, (2, 16, 16, 3))
    latents = raw.encode(pictures)
    model = Autoencoder(
        dataclasses.replace(CONFIG, latents_mean=(1, 2, 3, 4), latents_std=(2, 2, 0.5, 1))
    )
    model.update(raw.parameters())
    expected = (np.array(latents) - [1, 2, 3, 4]) / [2, 2, 0.5, 1]
    found = model.encode(pictures)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)
    np.testing.assert_allclose(
        np.array(model.decode(found)), np.array(raw.decode(latents)), atol=1e-5
    )
