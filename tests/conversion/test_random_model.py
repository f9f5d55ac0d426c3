"""Models of random weights, and quantized ones of one width that stay packed in memory."""

import dataclasses
import json
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from convert import random_model
from convert.pytorch.read_back import convert_student
from convert.pytorch.weights import to_torch
from convert.random_model import write_random_model
from convert.sample_teacher import sample
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.elastic import QuantizedElasticLinear
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.presets import TRANSFORMERS
from mlx_snapgen.public_config import MiniT2ITransformerConfig
from mlx_snapgen.teachers.folder import load_flow_teacher
from tests.tiny import (
    FLUX2,
    FLUX2_AUTOENCODER,
    KL_AUTOENCODER,
    QWEN_AUTOENCODER,
    TRANSFORMER,
    Z_IMAGE,
    require,
)

SETTINGS = {"height": 32, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture
def presets(monkeypatch):
    """The presets, small enough to be made in a moment."""
    sizes = {"hidden_size": 128, "head_dim": 32, "num_kv_heads": 4, "num_cross_kv_heads": 2}
    texts = {"text_dims": (64, 32), "text_width": 64}
    small = dataclasses.replace(TRANSFORMER, widths=(1.0,), **sizes, **texts)
    monkeypatch.setitem(TRANSFORMERS, "small", small)
    monkeypatch.setattr(random_model, "GEMMA", random_model.GEMMA | {"hidden_size": 64})
    clip = dataclasses.replace(
        random_model.TINYCLIP_19M, vocab_size=514, hidden_size=32, num_layers=1, num_heads=2
    )
    monkeypatch.setattr(random_model, "TINYCLIP_19M", clip)
    monkeypatch.setattr(random_model, "preset_autoencoder", lambda name: QWEN_AUTOENCODER)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_random_model_draws(presets, tmp_path, bits):
    write_random_model(tmp_path / "model", "small", bits=bits)
    assert {p.suffix for p in (tmp_path / "model").rglob("*") if p.is_file()} == {
        ".json",
        ".safetensors",
        ".model",
    }
    pipe = SnapGenPipeline.from_pretrained(tmp_path / "model", text_encoders=["clip"])
    picture = pipe("a red apple", **SETTINGS)[0]
    assert picture.size == (64, 32)
    assert np.array(picture).std() > 1
    packed = [
        m for _, m in pipe.transformer.named_modules() if isinstance(m, QuantizedElasticLinear)
    ]
    assert bool(packed) == (bits == 4)
    with pytest.raises(UserError, match="exists already"):
        write_random_model(tmp_path / "model", "small")
    with pytest.raises(UserError, match="has other text encoders"):
        write_random_model(tmp_path / "b", "stickers")


def test_its_gemma_loads_and_knows_every_byte(presets, tmp_path):
    require("mlx_lm")
    write_random_model(tmp_path / "model", "small")
    encoder = load_pretrained(tmp_path / "model").text_encoders[0]
    tokens, mask = encoder.tokenize(["café!"])
    assert mask.sum().item() == 1 + len("café!".encode())
    assert mx.isfinite(encoder(tokens, mask)).all()


def test_it_comes_back_from_pytorch_with_its_gemma(presets, tmp_path):
    """The folder inside the model's that its config names was left behind."""
    require("mlx_lm", "torch")
    write_random_model(tmp_path / "model", "small")
    model = load_pretrained(tmp_path / "model")
    to_torch(model, tmp_path / "torch", width="full")
    convert_student(tmp_path / "torch", tmp_path / "model", tmp_path / "back")
    gemma = load_pretrained(tmp_path / "back").text_encoders[0]
    tokens = gemma.tokenize(["a red apple"])
    assert mx.array_equal(gemma(*tokens), model.text_encoders[0](*tokens))


@pytest.mark.parametrize(("name", "tiny"), [("flux2-klein", FLUX2), ("z-image", Z_IMAGE)])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_random_teacher_draws(monkeypatch, tmp_path, name, tiny, bits):
    require("mlx_lm")
    is_flux2 = name == "flux2-klein"
    wide = {"num_heads": 4} if is_flux2 else {"hidden_size": 64, "num_heads": 4}
    transformer = dataclasses.replace(tiny, text_dims=192 if is_flux2 else 64, **wide)
    config = dataclasses.replace(
        random_model.TEACHERS[name],
        transformer=transformer,
        autoencoder=FLUX2_AUTOENCODER if is_flux2 else KL_AUTOENCODER,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 28, "vocab_size": 260}
    monkeypatch.setitem(random_model.TEACHERS, name, config)
    monkeypatch.setattr(random_model, "QWEN3_4B", random_model.QWEN3_4B | sizes)
    path = tmp_path / "teacher"
    monkeypatch.setattr(sys, "argv", ["x", name, str(path), "--quantize", str(bits or "none")])
    random_model.main()
    teacher, autoencoder = load_flow_teacher(path, lazy=True)
    assert teacher.has_few_step
    packed = {type(m) for _, m in teacher.network.named_modules()} & {nn.QuantizedLinear}
    packed |= {type(m) for _, m in teacher.network.named_modules()} & {QuantizedElasticLinear}
    assert bool(packed) == (bits == 4)
    settings = {"prompt": "a red apple", "height": 32, "width": 64, "num_inference_steps": 2}
    picture = sample(teacher, autoencoder, **settings)
    assert picture.size == (64, 32)
    assert np.array(picture).std() > 1


@pytest.mark.parametrize("bits", [None, 4])
def test_a_random_minit2i_draws_without_mlx_lm(monkeypatch, tmp_path, bits):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    tiny = MiniT2ITransformerConfig(
        num_layers=1, num_text_layers=1, num_heads=2, head_dim=32, mlp_size=64, text_dims=64
    )
    tiny = dataclasses.replace(tiny, image_size=32, patch_size=8)
    config = dataclasses.replace(random_model.TEACHERS["minit2i"], transformer=tiny)
    monkeypatch.setitem(random_model.TEACHERS, "minit2i", config)
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    monkeypatch.setattr(random_model, "FLAN_T5_LARGE", random_model.FLAN_T5_LARGE | sizes)
    path = tmp_path / "minit2i"
    monkeypatch.setattr(sys, "argv", ["x", "minit2i", str(path), "--quantize", str(bits or "none")])
    random_model.main()
    pipe = SnapGenPipeline.from_pretrained(path)
    picture = pipe("a red apple", num_inference_steps=2)[0]
    assert picture.size == (32, 32) and np.array(picture).std() > 1
    network = pipe.teacher.network
    packed = [m for _, m in network.named_modules() if type(m) is QuantizedElasticLinear]
    assert bool(packed) == (bits == 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_draw_what_dequantized_ones_do(presets, tmp_path, bits):
    write_random_model(tmp_path / "model", "small", dtype=mx.float32, bits=bits)
    dense = load_pretrained(tmp_path / "model", text_encoders=["clip"]).transformer
    packed = load_pretrained(tmp_path / "model", text_encoders=["clip"], packed=True).transformer
    sizes = [sum(p.nbytes for _, p in tree_flatten(m.parameters())) for m in (dense, packed)]
    # float32 scales and biases: two more bits for each weight of a group of 32.
    assert sizes[1] < sizes[0] * {4: 0.25, 8: 0.37}[bits]
    x = mx.random.normal((1, 4, 8, 4), key=mx.random.key(0))
    text = mx.random.normal((1, 5, 64), key=mx.random.key(1))
    mask = mx.ones((1, 5), mx.bool_)
    expected = dense(x, mx.array([0.5]), text, mask)
    assert mx.abs(expected).max() > 0.1
    assert mx.allclose(packed(x, mx.array([0.5]), text, mask), expected, atol=1e-4)


def test_an_elastic_model_is_never_packed(components, tmp_path):
    save_pretrained(
        tmp_path / "model", components, quantize={"transformer": {"bits": 8, "group_size": 32}}
    )
    assert json.loads((tmp_path / "model" / "config.json").read_text())["quantization"]
    loaded = load_pretrained(tmp_path / "model", packed=True).transformer
    assert all(mx.issubdtype(p.dtype, mx.floating) for _, p in tree_flatten(loaded.parameters()))
