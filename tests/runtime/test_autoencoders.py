"""Autoencoders of public models: tiles, attention in pieces, inputs at the edge."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders import layerwise
from mlx_snapgen.networks.autoencoders.dc_ae import depthwise
from mlx_snapgen.networks.autoencoders.qwen_image import QwenAutoencoder
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.networks.autoencoders.tiling import Stage, run_stages
from tests.tiny import (
    DC_AE,
    FLUX2_AUTOENCODER,
    KL_AUTOENCODER,
    QWEN_AUTOENCODER,
    TAEHV,
    randomize,
)


@pytest.mark.parametrize(
    ("config", "tile"), [(QWEN_AUTOENCODER, 3), (QWEN_AUTOENCODER, 10), (TAEHV, 6), (TAEHV, 12)]
)
def test_tiled_decoding_equals_decoding_at_once(config, tile):
    decoder = randomize(make_autoencoder(config), 0).decoder
    latents = mx.random.normal((2, 15, 23, 4), key=mx.random.key(1))
    whole, tiled = (np.array(decoder(latents, tile=size)) for size in (None, tile))
    np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("tile", [5, 9])
def test_dc_ae_in_tiles_equals_decoding_at_once(tile):
    decoder = randomize(make_autoencoder(DC_AE), 0).decoder
    latents = mx.random.normal((2, 4, 5, 8), key=mx.random.key(1))
    whole, tiled = (np.array(decoder(latents, tile=size)) for size in (None, tile))
    assert whole.shape == (2, 128, 160, 3)
    np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("side", [3, 5])
def test_depthwise_is_a_convolution_with_groups(side):
    x = mx.random.normal((2, 7, 9, 6), key=mx.random.key(0))
    weight = mx.random.normal((6, side, side, 1), key=mx.random.key(1))

    def total(convolve):
        return lambda x, weight: (convolve(x, weight) * mx.arange(6)).sum()

    expected = lambda x, weight: mx.conv2d(x, weight, padding=side // 2, groups=6)  # noqa: E731
    np.testing.assert_allclose(depthwise(x, weight), expected(x, weight), atol=1e-5)
    found, wanted = (mx.grad(total(f), (0, 1))(x, weight) for f in (depthwise, expected))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_channels": (8, 16, 32, 64)}, "six resolutions"),
        ({"decoder_blocks": (1, 1, 2, 1, 2, 0)}, "six resolutions"),
        ({"encoder_channels": (8, 16, 16, 24, 64, 64)}, "64 does not divide by 24"),
        ({"latent_channels": 12, "latents_mean": (), "latents_std": ()}, "12 latent channels"),
    ],
)
def test_sizes_that_dc_ae_cannot_have(changes, message):
    with pytest.raises(UserError, match=message):
        make_autoencoder(dataclasses.replace(DC_AE, **changes))


@pytest.mark.parametrize("size", [(16, 24), (10, 6)])
def test_layers_in_tiles_equal_decoding_at_once(monkeypatch, size):
    """Tiles smaller than the picture, with sides that they do not divide."""
    monkeypatch.setattr(layerwise.run_layers, "__kwdefaults__", {"tile": 13})
    decoder = randomize(make_autoencoder(FLUX2_AUTOENCODER), 0).decoder
    latents = mx.random.normal((2, *size, 4), key=mx.random.key(1))
    whole, tiled = (np.array(decoder(latents, tile=side)) for side in (None, 4))
    np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())


def test_layers_in_tiles_hold_the_features_of_one_picture():
    """Those of the widest layer, and a few bands."""
    config = dataclasses.replace(FLUX2_AUTOENCODER, decoder_channels=(32, 32, 64, 32))
    decoder = randomize(make_autoencoder(config), 0).decoder
    x = mx.zeros((1, 40, 24, 32))
    mx.eval(x, decoder.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    layers = {"norm": decoder.conv_norm_out, "conv": decoder.conv_out}
    layerwise.run_layers(decoder.up_blocks, x, tile=16, **layers)
    assert mx.get_peak_memory() - before < 1.3 * (320 * 192 * 64 * 4)


@pytest.mark.parametrize("config", [QWEN_AUTOENCODER, KL_AUTOENCODER, FLUX2_AUTOENCODER])
@pytest.mark.parametrize("tile", [7, 16])
def test_encoding_in_tiles_equals_encoding_at_once(monkeypatch, config, tile):
    monkeypatch.setattr(layerwise.TiledEncoder.in_tiles, "__kwdefaults__", {"tile": tile})
    model = randomize(make_autoencoder(config), 0)
    pictures = mx.random.normal((2, 48, 80, 3), key=mx.random.key(1))
    whole, tiled = (np.array(model.encode(pictures, in_tiles=each)) for each in (False, True))
    np.testing.assert_allclose(tiled, whole, atol=1e-5 * np.abs(whole).max())


def test_encoding_in_tiles_holds_the_features_of_two_layers():
    """Those that a block adds to, and those that it computes."""
    encoder = randomize(make_autoencoder(FLUX2_AUTOENCODER), 0).encoder
    pictures = mx.zeros((1, 320, 192, 3))
    mx.eval(pictures)
    peaks = []
    for encode in (encoder, lambda x: encoder.in_tiles(x, tile=16)):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(encode(pictures))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2.6 * (320 * 192 * 32 * 4) < 0.4 * peaks[0]


@pytest.mark.parametrize("config", [TAEHV, DC_AE])
def test_an_encoder_without_tiles_encodes_at_once(config):
    model = randomize(make_autoencoder(config), 0)
    pictures = mx.random.normal((1, 64, 64, 3), key=mx.random.key(1))
    whole, tiled = (model.encode(pictures, in_tiles=each) for each in (False, True))
    assert mx.array_equal(whole, tiled)


def test_latents_of_flux2_are_normalized_in_patches():
    model = make_autoencoder(FLUX2_AUTOENCODER)
    latents = mx.random.normal((2, 4, 6, 4), key=mx.random.key(1))
    found = model.normalize(latents)
    # Channel 2 at the odd rows and even columns is channel 2 * 4 + 1 * 2 + 0 of the patch.
    assert mx.allclose(found[:, 1::2, ::2, 2], (latents[:, 1::2, ::2, 2] - 1.0) / 2.0, atol=1e-6)
    assert mx.allclose(model.denormalize(found), latents, atol=1e-5)
    with pytest.raises(UserError, match="choose a picture size that divides by 16"):
        model.decode(latents[:, :3])


def test_latents_without_a_mean_have_mean_0():
    zero = dataclasses.replace(
        QWEN_AUTOENCODER, latents_mean=(0.0,) * QWEN_AUTOENCODER.latent_channels
    )
    latents = mx.random.normal((1, 2, 2, QWEN_AUTOENCODER.latent_channels), key=mx.random.key(0))
    found, expected = (
        make_autoencoder(config).denormalize(latents)
        for config in (dataclasses.replace(zero, latents_mean=()), zero)
    )
    assert mx.array_equal(found, expected) and not mx.array_equal(found, latents)


def test_tiles_have_no_more_margin_than_they_need():
    """A reach that is one pixel short shows: the margins are exact, and the check above sees it."""
    kernel = mx.random.normal((1, 3, 3, 1), key=mx.random.key(0))
    blurs = [lambda x: mx.conv2d(x, kernel, padding=1)] * 3
    x = mx.random.normal((1, 20, 20, 1), key=mx.random.key(1))
    whole = run_stages([Stage(blur, 1, 1) for blur in blurs], x, tile=None)
    for reach, same in ((1, True), (0, False)):
        tiled = run_stages([Stage(blur, 1, reach) for blur in blurs], x, tile=7)
        assert mx.allclose(tiled, whole, atol=1e-5).item() is same


def test_attention_in_pieces_is_attention(monkeypatch):
    model = randomize(QwenAutoencoder(QWEN_AUTOENCODER), 0)
    x = mx.random.normal((2, 5, 7, 32), key=mx.random.key(1))
    block = model.decoder.mid_block.attentions[0]
    whole = np.array(block(x))
    monkeypatch.setattr("mlx_snapgen.networks.autoencoders.residual.MAX_SCORES", 2 * 35 * 8)
    for in_turn in (False, True):
        np.testing.assert_allclose(np.array(block(x, in_turn)), whole, atol=1e-5)


def test_a_pixel_of_zeros_stays_finite():
    model = randomize(QwenAutoencoder(QWEN_AUTOENCODER), 0)
    model.decoder.conv_in.bias = mx.zeros(32)
    assert mx.isfinite(model.decode(mx.zeros((1, 3, 2, 4)))).all()
