"""The tiny autoencoder against the video network that its weights are made for."""

import dataclasses

import mlx.core as mx
import pytest

from convert.parity.originals import relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.taehv import TinyAutoencoder
from mlx_snapgen.presets import TAEW2_1
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from tests.conversion.test_qwen_autoencoder import check_keys
from tests.tiny import TAEHV

torch = pytest.importorskip("torch", reason="the video network needs torch: pip install torch")
F = torch.nn.functional
save_file = pytest.importorskip("safetensors.torch").save_file


def public_weights(config):
    """Random weights under the public keys: numbered layers of two sequences."""
    torch.manual_seed(0)
    weights = {}

    def add(name, rows, columns, side, bias):
        weights[f"{name}.weight"] = torch.randn(rows, columns, side, side) * (
            (columns * side * side) ** -0.5
        )
        if bias:
            weights[f"{name}.bias"] = torch.randn(rows) * 0.1

    def add_block(name, channels):
        add(f"{name}.conv.0", channels, 2 * channels, 3, True)
        add(f"{name}.conv.2", channels, channels, 3, True)
        add(f"{name}.conv.4", channels, channels, 3, True)

    c = config.encoder_channels[0]
    add("encoder.0", c, 3, 3, True)
    for first, frames in ((2, 2), (7, 2), (12, 1)):
        add(f"encoder.{first}.conv", c, frames * c, 1, False)
        add(f"encoder.{first + 1}", c, c, 3, False)
        for k in range(3):
            add_block(f"encoder.{first + 2 + k}", c)
    add("encoder.17", config.latent_channels, c, 3, True)
    channels = config.decoder_channels
    add("decoder.1", channels[0], config.latent_channels, 3, True)
    for level, (first, frames) in enumerate(((3, 1), (9, 2), (15, 2))):
        c = channels[level]
        for k in range(3):
            add_block(f"decoder.{first + k}", c)
        add(f"decoder.{first + 4}.conv", frames * c, c, 1, False)
        add(f"decoder.{first + 5}", channels[level + 1], c, 3, False)
    add("decoder.22", 3, channels[3], 3, True)
    return weights


class Video:
    """The network as its weights define it, on frames (T, C, H, W), time and all."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, name, x, stride=1):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    def block(self, name, x):
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        y = torch.cat([x, before], 1)
        for k in (0, 2):
            y = F.relu(self.conv(f"{name}.conv.{k}", y))
        return F.relu(self.conv(f"{name}.conv.4", y) + x)

    def encode(self, frames):
        x = F.relu(self.conv("encoder.0", frames))
        for first in (2, 7, 12):
            _, c, h, w = x.shape
            joined = self.weights[f"encoder.{first}.conv.weight"].shape[1] // c
            x = self.conv(f"encoder.{first}.conv", x.reshape(-1, joined * c, h, w))
            x = self.conv(f"encoder.{first + 1}", x, stride=2)
            for k in range(3):
                x = self.block(f"encoder.{first + 2 + k}", x)
        return self.conv("encoder.17", x)

    def decode(self, latents):
        x = F.relu(self.conv("decoder.1", torch.tanh(latents / 3) * 3))
        for first in (3, 9, 15):
            for k in range(3):
                x = self.block(f"decoder.{first + k}", x)
            x = F.interpolate(x, scale_factor=2)
            _, c, h, w = x.shape
            x = self.conv(f"decoder.{first + 4}.conv", x).reshape(-1, c, h, w)
            x = self.conv(f"decoder.{first + 5}", x)
        x = self.conv("decoder.22", F.relu(x))
        return x[3:]


@pytest.mark.parametrize(("config", "size"), [(TAEHV, (40, 72)), (TAEW2_1, (24, 40))])
def test_a_picture_is_a_video_of_one_latent(tmp_path, config, size):
    weights, path = public_weights(config), tmp_path / "taew2_1.safetensors"
    save_file(weights, path)
    ours = read_autoencoder(path)
    assert ours.config == config
    video = Video(weights)
    picture = torch.rand(1, 3, *size)
    latents = torch.randn(1, config.latent_channels, size[0] // 8, size[1] // 8)
    pairs = {
        "encode": (
            ours.encode(mx.array(picture.permute(0, 2, 3, 1).numpy()) * 2 - 1),
            video.encode(picture.repeat(4, 1, 1, 1)),
        ),
        "decode": (
            (ours.decode(mx.array(latents.permute(0, 2, 3, 1).numpy())) + 1) / 2,
            video.decode(latents),
        ),
    }
    for what, (found, expected) in pairs.items():
        expected = expected.permute(0, 2, 3, 1)
        error = relative_difference(found, expected)
        print(what, error)
        assert error < 1e-4, f"{what} differs by {error:.1e}"


def test_every_key_must_be_accounted_for(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(public_weights(TAEHV), path)
    check_keys(path, path, {"decoder.23.weight": mx.zeros(3)}, gone="decoder.3.conv.2.bias")


def test_files_that_are_something_else_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    mx.save_safetensors(str(path), {"weight": mx.zeros(3)})
    with pytest.raises(UserError, match=r"is no TAEHV autoencoder: it lacks 'decoder.1.weight'"):
        read_autoencoder(path)
    with pytest.raises(UserError, match=r"taew2_1.pth is not a .safetensors file"):
        read_autoencoder(tmp_path / "taew2_1.pth")
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="no safetensors file"):
        read_autoencoder(path)
    with pytest.raises(UserError, match="encoder_blocks at three"):
        TinyAutoencoder(dataclasses.replace(TAEHV, encoder_blocks=(3, 3)))
