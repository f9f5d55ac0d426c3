"""DC-AE: conversion, half precision, and its decoder in PyTorch and Core ML."""

import dataclasses
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert.coreml import export as exporter
from convert.coreml import packages
from convert.coreml.options import ExportSettings
from convert.libraries import import_coremltools
from convert.mil.execution import Interpreter
from convert.parity.autoencoders import compare_dc_ae, make_dc_ae
from convert.parity.originals import relative_difference
from convert.pytorch.read_back import our_weights
from mlx_snapgen import presets
from mlx_snapgen.checkpoint.model import load_autoencoder
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from mlx_snapgen.pictures import decibels, psnr
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.keys import autoencoders
from mlx_snapgen.public.keys.autoencoders import read_autoencoder
from mlx_snapgen.public.source import find_source
from tests.conversion.test_coreml import sharpen
from tests.conversion.test_qwen_autoencoder import check_keys
from tests.tiny import DC_AE, MODEL, TEXT, TRANSFORMER, make_components, randomize, require

BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SANA = {
    "_class_name": "AutoencoderDC",
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": BLOCKS,
    "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
"""config.json of SANA's autoencoder."""


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """diffusers' network with random weights, at the size of `DC_AE`: its folder."""
    require("torch", "diffusers")
    folder = tmp_path_factory.mktemp("dc-ae") / "public"
    make_dc_ae(folder)
    return folder


def test_a_folder_is_converted(public, tmp_path):
    report = convert(find_source(str(public)), tmp_path / "out")
    assert report["kind"] == "dc-ae" and not report["keys"]["ignored"]
    found, expected = load_autoencoder(tmp_path / "out"), read_autoencoder(public)
    assert found.config == DC_AE
    weights = dict(tree_flatten(expected.parameters()))
    for name, value in tree_flatten(found.parameters()):
        assert mx.array_equal(value, weights[name]), name


def test_every_part_of_the_network_has_an_effect_on_the_comparison(public, monkeypatch):
    for path in ("down_blocks.3.0.attn.to_out", "up_blocks.5.0.conv_out.conv_depth"):

        def broken(folder, path=path):
            model = read_autoencoder(folder)
            layers = dict(model.named_modules())
            layer = next(layers[name] for name in layers if name.endswith(path))
            layer.weight = layer.weight + 0.1
            return model

        monkeypatch.setattr("convert.parity.autoencoders.read_autoencoder", broken)
        assert max(relative_difference(*pair[1:]) for pair in compare_dc_ae(public)) > 1e-3


def test_every_key_must_be_accounted_for(public, tmp_path):
    for file in public.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    extra = {"decoder.up_blocks.0.0.attn.to_p.weight": mx.zeros((4, 4))}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    check_keys(tmp_path, path, extra, gone="decoder.up_blocks.4.1.attn.to_k.weight")


def test_the_config_of_sana():
    assert autoencoders.dc_ae_config(SANA) == presets.DC_AE
    assert presets.DC_AE.downsampling == 32


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3}, "only .* rms_norm"),
        ({"encoder_qkv_multiscales": [[]] * 6}, "only .* encoder_qkv_multiscales"),
        ({"downsample_block_type": "pixel_unshuffle"}, "with downsample_block_type conv, as in"),
        ({"encoder_layers_per_block": [0, 4, 8, 2, 2, 2]}, "six resolutions with blocks"),
        ({"latent_channels": None}, "does not describe"),
        ({"scaling_factor": 0}, "'scaling_factor' must not be 0"),
        ({"latent_channels": 0}, "'latent_channels' must be 1 to"),
        ({"decoder_block_out_channels": "123456"}, "'decoder_channels' must be a list"),
    ],
)
def test_other_networks_are_refused(tmp_path, values, hint):
    (tmp_path / "config.json").write_text(json.dumps(SANA | values))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(UserError, match=hint):
        read_autoencoder(tmp_path)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_half_precision(dtype):
    model = randomize(make_autoencoder(DC_AE), 0)
    picture = mx.random.uniform(-1, 1, (1, 64, 32, 3), key=mx.random.key(0))
    latents = mx.random.normal((1, 2, 1, 8), key=mx.random.key(1))
    expected = model.encode(picture), model.decode(latents)
    model.set_dtype(dtype)
    found = model.encode(picture.astype(dtype)), model.decode(latents.astype(dtype))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype in (dtype, mx.float32)  # latents are normalized in float32
        difference = np.array(a.astype(mx.float32)) - np.array(b)
        assert decibels(np.square(difference).mean(), np.ptp(np.array(b))) > 40


# --- PyTorch and Core ML ------------------------------------------------------------------------


def twin_of(model):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    from convert.pytorch.dc_ae import Decoder
    from convert.pytorch.weights import torch_weights

    twin = Decoder(model.config)
    shapes = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    weights = torch_weights(model.decoder, shapes)
    twin.load_state_dict({name: torch.tensor(make()) for name, make in weights.items()})
    return twin.eval().requires_grad_(False)


def loud(model):
    """The model with queries, keys and values whose sums over a picture exceed fp16's range."""
    for path, layer in model.named_modules():
        if path.endswith("to_qkv"):
            layer.weight = 40 * layer.weight
    return model


def test_the_decoder_in_pytorch_is_mlx_s():
    model = randomize(make_autoencoder(DC_AE), 5)
    twin = twin_of(model)
    import torch

    latents = mx.random.normal((2, 3, 5, 8), key=mx.random.key(0))
    found = twin(torch.tensor(np.array(latents)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_difference(model.decode(latents), found) < 1e-4
    weights = {name: mx.array(value.numpy()) for name, value in twin.state_dict().items()}
    back = our_weights(model.decoder, weights, None)
    for name, value in tree_flatten(model.decoder.parameters()):
        assert mx.array_equal(back[name], value), name


@pytest.mark.parametrize(("precision", "least"), [("float32", 90), ("float16", 45)])
def test_the_decoders_package(tmp_path, precision, least):
    require("torch", "coremltools")
    import torch

    from convert.coreml.package import Network, write_package

    import_coremltools()
    model = loud(randomize(make_autoencoder(DC_AE), 5))
    latents = np.array(mx.random.normal((1, 2, 3, 8), key=mx.random.key(0))).transpose(0, 3, 1, 2)
    path, inputs = tmp_path / "Decoder.mlpackage", {"latents": torch.tensor(latents)}
    write_package(
        path,
        {"main": Network(twin_of(model), inputs, ("picture",))},
        target="ios17",
        precision=precision,
        about={},
        description="",
    )
    (found,) = Interpreter(path)({"latents": latents}).values()
    expected = np.array(model.decode(mx.array(latents.transpose(0, 2, 3, 1))))
    difference = found.astype(np.float32).transpose(0, 2, 3, 1) - expected
    assert decibels(np.square(difference).mean(), np.ptp(expected)) > least


def test_an_exported_model_draws_the_picture(tmp_path):
    """A model with a token for each latent of DC-AE."""
    require("torch", "coremltools")
    config = dataclasses.replace(
        MODEL,
        image_size=(64, 128),
        autoencoder=DC_AE,
        transformer=dataclasses.replace(
            TRANSFORMER,
            hidden_size=32,
            head_dim=16,
            num_kv_heads=1,
            num_cross_kv_heads=1,
            patch_size=1,
            latent_channels=8,
            text_dims=(16,),
            text_width=16,
            widths=(1.0,),
        ),
        text_encoders=(dataclasses.replace(TEXT, max_length=12),),
    )
    model = dataclasses.replace(make_components(config), vocabulary=None)
    decoder = model.autoencoder.decoder
    decoder.out = decoder.conv_out
    sharpen(model)
    del decoder["out"]
    exporter.export_coreml(model, tmp_path / "out", ExportSettings())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["not_exported"] == []
    (expected,) = SnapGenPipeline(model)("a red apple", seed=3)
    picture = packages.Packages(tmp_path / "out").draw("a red apple", seed=3)
    assert picture.size == (128, 64) and np.asarray(picture).std() > 5
    packages.check_picture(psnr(np.asarray(picture), np.asarray(expected)))
