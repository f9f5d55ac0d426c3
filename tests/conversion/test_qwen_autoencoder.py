"""Qwen-Image's autoencoder: parity with diffusers, tiling, and drawing with it."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest

from convert.autoencoder import swap_autoencoder
from convert.parity.originals import relative_difference
from convert.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.checkpoint.model import load_pretrained
from mlx_snapgen.config import QWEN_IMAGE_AUTOENCODER, AutoencoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.qwen_image import QwenAutoencoder
from mlx_snapgen.networks.autoencoders.tiling import Stage, run_stages
from mlx_snapgen.pipeline import SnapGenPipeline
from tests.tiny import randomize

SMALL = AutoencoderConfig(
    kind="qwen-image",
    latent_channels=4,
    encoder_channels=(8, 16, 32, 32),
    decoder_channels=(32, 32, 16, 8),
    encoder_blocks=(1, 1, 1, 1),
    decoder_blocks=(2, 2, 2, 2),
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(1.5, 0.9, 1.1, 2.0),
)
SMALL_SIZES = {
    "base_dim": 8,
    "z_dim": 4,
    "num_res_blocks": 1,
    "latents_mean": list(SMALL.latents_mean),
    "latents_std": list(SMALL.latents_std),
}
"""The same for diffusers."""


def public_autoencoder(**sizes):
    """diffusers' network with random weights everywhere, as large as trained ones."""
    why = "parity with diffusers needs torch and diffusers: pip install torch diffusers"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    torch.manual_seed(0)
    network = diffusers.AutoencoderKLQwenImage(**sizes).eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if name.endswith("gamma"):
            p.normal_(1, 0.1)
        elif name.endswith("bias"):
            p.normal_(0, 0.1)
        else:
            p.normal_(0, (p[0, :, -1] if p.ndim == 5 else p[0]).numel() ** -0.5)
    return network


def relative_error(found: mx.array, expected) -> float:
    """`expected` is a torch picture (B, C, [1,] H, W)."""
    expected = expected[:, :, 0] if expected.ndim == 5 else expected
    return relative_difference(found, expected.permute(0, 2, 3, 1))


def layers(network):
    """(name, module) of every block of ours, in the order of computation."""
    encoder, decoder = network.encoder, network.decoder
    yield "encoder.conv_in", encoder.conv_in
    for i, block in enumerate(encoder.down_blocks):
        yield f"encoder.down_blocks.{i}", block
    yield "encoder.mid_block", encoder.mid_block
    yield "decoder.conv_in", decoder.conv_in
    yield "decoder.mid_block", decoder.mid_block
    for i, block in enumerate(decoder.up_blocks):
        yield f"decoder.up_blocks.{i}", block


def check_parity(public, folder, height, width, batch=1):
    """Every block on the public block's own input, then encode and decode as a whole."""
    import torch

    public.save_pretrained(folder)
    ours = read_autoencoder(folder)
    seen = {}
    for name, module in public.named_modules():
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: (args[0], out)})
        )
    pictures = torch.rand(batch, 3, 1, height, width) * 2 - 1
    latents = torch.randn(batch, ours.config.latent_channels, 1, height // 8, width // 8)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (public.config.latents_mean, public.config.latents_std)
    )
    encoded = (public.encode(pictures).latent_dist.mode() - mean) / std
    decoded = public.decode(latents * std + mean).sample

    def channels_last(x):
        return mx.array(x[:, :, 0].permute(0, 2, 3, 1).contiguous().numpy())

    for name, layer in layers(ours):
        before, after = seen[name]
        error = relative_error(layer(channels_last(before)), after)
        assert error < 1e-4, f"{name} is the first that differs, by {error:.1e}"
    errors = {
        "encode": relative_error(ours.encode(channels_last(pictures)), encoded),
        # The public one clips.
        "decode": relative_error(mx.clip(ours.decode(channels_last(latents)), -1, 1), decoded),
        "decoder": relative_error(ours.decode(channels_last(latents)), seen["decoder"][1]),
    }
    print(errors)
    assert max(errors.values()) < 1e-4, errors
    return ours


def test_parity_with_diffusers_at_a_small_size(tmp_path):
    ours = check_parity(public_autoencoder(**SMALL_SIZES), tmp_path, 40, 72, batch=2)
    assert ours.config == SMALL


def test_parity_with_diffusers_at_the_real_size(tmp_path):
    ours = check_parity(public_autoencoder(), tmp_path, 24, 40)
    assert ours.config == QWEN_IMAGE_AUTOENCODER


def test_every_key_must_be_accounted_for(tmp_path):
    public = public_autoencoder(**SMALL_SIZES)
    public.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = mx.load(str(path))
    extra = weights | {"decoder.mid_block.time_conv.weight": mx.zeros((4, 4, 3, 1, 1))}
    mx.save_safetensors(str(path), extra)
    with pytest.raises(UserError, match=r"another network.*decoder.mid_block.time_conv.weight"):
        read_autoencoder(tmp_path)
    del weights["decoder.conv_in.bias"]
    mx.save_safetensors(str(path), weights)
    with pytest.raises(UserError, match=r"does not fit its config: it lacks decoder.conv_in.bias"):
        read_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "expected an AutoencoderKLQwenImage"),
        ({"input_channels": 4}, "only input_channels 3"),
        ({"attn_scales": [0.5]}, "only attn_scales"),
        ({"z_dim": None, "latents_std": None}, "does not describe"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    config = {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 8,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "z_dim": 4,
        "latents_mean": [],
        "latents_std": [],
    }
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(UserError, match=hint):
        read_autoencoder(tmp_path)


@pytest.mark.parametrize("tile", [3, 10])
def test_tiled_decoding_equals_decoding_at_once(tile):
    model = QwenAutoencoder(SMALL)
    randomize(model, 0)
    latents = mx.random.normal((2, 15, 23, 4), key=mx.random.key(1))
    whole = model.decoder(latents, tile=None)
    tiled = model.decoder(latents, tile=tile)
    np.testing.assert_allclose(np.array(tiled), np.array(whole), atol=1e-5 * mx.abs(whole).max())


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
    model = QwenAutoencoder(SMALL)
    randomize(model, 0)
    x = mx.random.normal((2, 5, 7, 32), key=mx.random.key(1))
    block = model.decoder.mid_block.attentions[0]
    whole = np.array(block(x))
    monkeypatch.setattr("mlx_snapgen.networks.autoencoders.residual.MAX_SCORES", 2 * 35 * 8)
    for in_turn in (False, True):
        np.testing.assert_allclose(np.array(block(x, in_turn)), whole, atol=1e-5)


def test_a_pixel_of_zeros_stays_finite():
    model = QwenAutoencoder(SMALL)
    randomize(model, 0)
    model.decoder.conv_in.bias = mx.zeros(32)
    assert mx.isfinite(model.decode(mx.zeros((1, 3, 2, 4)))).all()


def test_a_model_draws_with_it(model_folder, tmp_path):
    model = QwenAutoencoder(SMALL)
    randomize(model, 0)
    swap_autoencoder(model_folder, model, tmp_path / "model")
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "model")
    assert isinstance(pipe.autoencoder, QwenAutoencoder)
    settings = {"height": 32, "width": 64, "num_inference_steps": 1, "guidance_scale": 1}
    last = list(pipe.generate("a red car", **settings))[-1]
    expected = mx.round((mx.clip(model.decode(last.x0), -1, 1) + 1) * 127.5)[0]
    np.testing.assert_array_equal(np.array(last.preview()), np.array(expected.astype(mx.uint8)))
    again = pipe.autoencoder.encode(model.decode(last.x0))
    assert again.shape == last.x0.shape
    with pytest.raises(UserError, match="exists already"):
        swap_autoencoder(model_folder, model, tmp_path / "model")


def test_a_model_of_other_latents_is_refused(model_folder, tmp_path):
    model = QwenAutoencoder(
        dataclasses.replace(SMALL, latent_channels=8, latents_mean=(), latents_std=())
    )
    with pytest.raises(UserError, match="4 latent channels, the autoencoder gives 8"):
        swap_autoencoder(model_folder, model, tmp_path / "model")


def test_config_mistakes_are_named(model_folder, tmp_path):
    with pytest.raises(UserError, match=r"encoder_channels .*need four numbers each"):
        QwenAutoencoder(dataclasses.replace(SMALL, encoder_channels=(8, 16)))
    swap_autoencoder(model_folder, QwenAutoencoder(SMALL), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"qwen-image"', '"qwen"'))
    with pytest.raises(UserError, match="unknown autoencoder kind 'qwen', known: convolutional"):
        load_pretrained(tmp_path / "model")
