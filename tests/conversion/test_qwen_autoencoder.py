"""Qwen-Image's autoencoder: parity with diffusers, and what is refused."""

import json

import mlx.core as mx
import pytest

from convert.parity.originals import fill, library, qwen_image_vae, relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.presets import QWEN_IMAGE_AUTOENCODER
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from tests.tiny import QWEN_AUTOENCODER, require


@pytest.fixture
def public():
    """diffusers' network with random weights, at the size of `QWEN_AUTOENCODER`."""
    require("torch", "diffusers")
    return fill(qwen_image_vae())


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


def test_parity_with_diffusers_at_a_small_size(public, tmp_path):
    assert check_parity(public, tmp_path, 40, 72, batch=2).config == QWEN_AUTOENCODER


def test_parity_with_diffusers_at_the_real_size(tmp_path):
    require("torch", "diffusers")
    public = fill(library("diffusers").AutoencoderKLQwenImage())
    assert check_parity(public, tmp_path, 24, 40).config == QWEN_IMAGE_AUTOENCODER


def test_every_key_must_be_accounted_for(public, tmp_path):
    public.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    extra = {"decoder.mid_block.time_conv.weight": mx.zeros((4, 4, 3, 1, 1))}
    check_keys(tmp_path, path, extra, gone="decoder.conv_in.bias")


def check_keys(source, path, extra, *, gone):
    """What `read_autoencoder` says of a key too many and of one too few in the file at `path`."""
    weights = mx.load(str(path))
    mx.save_safetensors(str(path), weights | extra)
    with pytest.raises(UserError, match=f"another network.*{next(iter(extra))}"):
        read_autoencoder(source)
    del weights[gone]
    mx.save_safetensors(str(path), weights)
    with pytest.raises(UserError, match=f"does not fit its config: it lacks {gone}"):
        read_autoencoder(source)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "expected an AutoencoderKLQwenImage"),
        ({"input_channels": 4}, "only input_channels 3"),
        ({"attn_scales": [0.5]}, "only attn_scales"),
        ({"latents_std": None}, "latents_std needs a number for each of 4 channels"),
        ({"latents_mean": []}, "latents_mean needs a number for each of 4 channels"),
        ({"dim_mult": None}, "does not describe"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    config = {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": 8,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 1,
        "z_dim": 4,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(UserError, match=hint):
        read_autoencoder(tmp_path)
