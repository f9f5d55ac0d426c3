"""Core ML export: the packages compute what MLX does, and the report tells what is in them.

Needs coremltools and torch: `pip install -e ".[coreml]"`. The packages are run in numpy.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCAB_SIZE, randomise

from convert import coreml
from mlx_snapgen.autoencoder import Autoencoder
from mlx_snapgen.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, TransformerConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.text_encoder import Tokenizer, TransformerTextEncoder, encode_prompts
from mlx_snapgen.transformer import EfficientDiT
from mlx_snapgen.weights import Components

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red apple", ""]


def test_a_resolution_is_one_number_or_two():
    assert coreml.parse_resolution("512") == (512, 512)
    assert coreml.parse_resolution("512x768") == (512, 768)
    for text in ("", "512x", "big", "-512", "512x768x3"):
        with pytest.raises(UserError, match="a resolution is 512 or 512x768"):
            coreml.parse_resolution(text)


def test_coremltools_that_is_missing_is_one_line(tmp_path):
    code = (
        "import runpy, sys; sys.modules['coremltools'] = None; "
        f"sys.argv = ['coreml', 'model', {str(tmp_path / 'out')!r}]; "
        "runpy.run_module('convert.coreml', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this needs coremltools")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def model(tokenizer_bytes):
    encoder = TextEncoderConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1, num_heads=2, max_length=12
    )
    config = ModelConfig(
        name="random",
        image_size=(96, 64),
        transformer=TransformerConfig(
            hidden_size=16,
            head_dim=8,
            num_kv_heads=1,
            num_cross_kv_heads=2,
            blocks=(1, 1, 1),
            num_bands=4,
            latent_channels=4,
            text_dims=(16,),
            text_width=16,
            frequency_dim=32,
            widths=(1.0,),
        ),
        autoencoder=AutoencoderConfig(
            latent_channels=4,
            encoder_channels=(8, 16),
            decoder_channels=(16, 12, 8),
            encoder_blocks=(1, 1),
            decoder_blocks=(1, 1, 1),
            latents_mean=(0.1, -0.2, 0.3, 0.0),
            latents_std=(1.0, 0.9, 1.1, 1.2),
        ),
        text_encoders=(encoder,),
    )
    made = Components(
        config,
        EfficientDiT(config.transformer),
        Autoencoder(config.autoencoder),
        [TransformerTextEncoder(encoder, Tokenizer(tokenizer_bytes, encoder.max_length))],
    )
    for seed, module in enumerate(made.modules().values()):
        randomise(module, seed)
    return made


@pytest.fixture(
    scope="module", params=[("float16", "ios17", 1e-2), ("float32", "ios18", 1e-4)], ids=str
)
def exported(request, model, tmp_path_factory):
    """Folder of the packages, and the largest difference relative to the largest value."""
    pytest.importorskip("torch", reason="Core ML export needs torch: pip install -e '.[coreml]'")
    try:
        coreml.coremltools()
    except UserError as error:
        pytest.skip(str(error))
    precision, target, tolerance = request.param
    folder = tmp_path_factory.mktemp("coreml") / "packages"
    coreml.export_coreml(model, folder, "full", target, precision)
    return folder, tolerance


def run(path, **inputs):
    from convert.mil_interpreter import run

    return run(path, {name: np.array(value) for name, value in inputs.items()})


def assert_close(actual, expected, tolerance):
    expected = np.array(expected)
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_packages_compute_what_mlx_does(exported, model, prompt):
    folder, tolerance = exported
    encoder, network = model.text_encoders[0], model.transformer
    tokens, mask = encoder.tokenize([prompt])
    text, _ = encode_prompts([prompt], [encoder], network)
    (actual,) = run(folder / "TextEncoder.mlpackage", tokens=tokens, mask=mask).values()
    # What padding says is nobody's business.
    counts = np.array(mask)[0]
    assert_close(actual[0, :, 0].T[counts], text[0][: counts.sum()], tolerance)

    x_t = mx.random.normal((1, 12, 8, 4), key=mx.random.key(1))
    t = mx.array([0.7315])
    inputs = {
        "latents": x_t.transpose(0, 3, 1, 2),
        "timestep": t,
        "text": text.transpose(0, 2, 1)[:, :, None],
        "mask": mask,
    }
    found = run(folder / "Transformer.mlpackage", **inputs)["velocity"]
    assert_close(found.transpose(0, 2, 3, 1), network(x_t, t, text, mask), tolerance)

    found = run(folder / "Decoder.mlpackage", latents=x_t.transpose(0, 3, 1, 2))["picture"]
    assert_close(found.transpose(0, 2, 3, 1), model.autoencoder.decode(x_t), tolerance)


def test_the_report_tells_what_is_in_the_packages(exported, model):
    folder, _ = exported
    report = json.loads((folder / "report.json").read_text())
    assert (report["width"], report["height"], report["image_width"]) == ("full", 96, 64)
    assert report["not_exported"] == []
    assert set(report["versions"]) == {"mlx_snapgen", "coremltools", "torch", "numpy", "python"}
    transformer = report["packages"]["Transformer"]
    counts = transformer["functions"]["main"]["operations"]
    heads, sparse, dense, bands = 2, 2, 1, 3
    # In a sparse block every head attends to cells, to the text and in each band; the others have
    # no bands but attend to all.
    attentions = heads * (sparse * (2 + bands) + dense * 2)
    assert counts["softmax"] == attentions
    assert counts["einsum"] == 2 * attentions
    # All heads turn their keys at once.
    assert counts["transpose"] <= 3 * sparse + 2 * dense + 2
    assert counts["reshape"] <= 10 * sparse + 5 * dense + 10
    assert transformer["weight_bytes"] > transformer["parameters"] * (
        2 if report["precision"] == "float16" else 4
    )
    names = {"Transformer.mlpackage", "Decoder.mlpackage", "TextEncoder.mlpackage"}
    files = {"config.json", "report.json", "tokenizer_0.model"}
    assert {path.name for path in folder.iterdir()} == names | files
    with pytest.raises(UserError, match="exists already"):
        coreml.export_coreml(model, folder, "full")


def test_a_part_without_a_twin_is_left_out(model, monkeypatch, tmp_path):
    pytest.importorskip("torch", reason="Core ML export needs torch: pip install -e '.[coreml]'")
    from convert.to_torch import torch_networks, without_twin

    config = dataclasses.replace(
        model.config, text_encoders=(TextEncoderConfig(kind="gemma", hidden_size=16),)
    )
    networks = torch_networks(dataclasses.replace(model, config=config))
    assert set(networks) == {"transformer", "decoder"}
    assert without_twin(model, networks) == ["text_encoder_0"]
