"""Core ML export: the packages compute what MLX does, and the report tells what is in them.

Needs coremltools and torch: `pip install -e ".[coreml]"`. The packages are run in numpy.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from convert import libraries
from convert.coreml import __main__ as command
from convert.coreml import compare as comparison
from convert.coreml import export as exporter
from convert.coreml import options as coreml_options
from convert.coreml import package, packages
from convert.coreml.options import ExportSettings
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import EfficientDiT, encode_prompts
from mlx_snapgen.pictures import psnr
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.quantize import palettes
from mlx_snapgen.semantics import GROUND, SemanticConfig
from tests.tiny import (
    MODEL,
    TEXT,
    TRANSFORMER,
    make_components,
    randomize,
    require,
    semantic_map_of,
)

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red apple", ""]
WIDTHS = ("full", "small")
LEAST = 250
"""Layers of this many weights get palettes here; the real number is above what this model has."""

IN_CHUNKS = ExportSettings(widths=WIDTHS, target="ios18", precision="float32", chunks=2)
PALETTES = ExportSettings(widths=WIDTHS, target="ios18", quantize=5.0)


def test_a_resolution_is_one_number_or_two():
    assert coreml_options.parse_resolution("512") == (512, 512)
    assert coreml_options.parse_resolution("512x768") == (512, 768)
    for text in ("", "512x", "big", "-512", "512x768x3"):
        with pytest.raises(UserError, match="a resolution is 512 or 512x768"):
            coreml_options.parse_resolution(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "height must be a positive multiple of 32 pixels"),
        (["--model-widths", "full", "small"], "several widths in one package need iOS 18"),
        (["--model-widths", "full", "full", "--target", "ios18"], "a width is named twice"),
        (["--quantize", "3"], "takes 4 to 8 bits"),
        (["--quantize", "few"], "takes 4 to 8 bits"),
        (["--quantize", "4.3", "--precision", "float32"], "palettes are of float16"),
        (["--chunks", "9"], "--chunks takes 1 to 4"),
        (["--prompts-file", "no-such-file"], "cannot read no-such-file"),
        (["--height", "0"], "0 is below 1"),
        (["--chunks", "0"], "0 is below 1"),
        (["--prompts-file", "/dev/null"], "cannot read /dev/null: it is a device"),
        (["--prompts-file", str(ROOT / "LICENSE")], "add --quantize BITS"),
        (["--model-width", "tiny"], "transformer.safetensors is missing"),
    ],
)
def test_what_cannot_be_is_said_at_once(options, message, model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "tokenizer_0.model", "tokenizer_1.model"):
        (folder / file).write_bytes((model_folder / file).read_bytes())
    monkeypatch.setattr(command, "require_coremltools", lambda: None)
    monkeypatch.setattr(sys, "argv", ["coreml", str(folder), str(tmp_path / "out"), *options])
    with pytest.raises(UserError, match=message):
        command.main()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_first(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "require_coremltools", lambda: None)
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(sys, "argv", ["coreml", str(model_folder), str(tmp_path / "out")])
    with pytest.raises(UserError, match="has 0 MB free, the export takes"):
        command.main()


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(
        MODEL,
        image_size=(96, 64),
        transformer=dataclasses.replace(
            TRANSFORMER,
            hidden_size=32,
            head_dim=16,
            num_kv_heads=1,
            num_cross_kv_heads=1,
            num_bands=4,
            text_dims=(16,),
            text_width=16,
            widths=(1.0, 0.5),
        ),
        text_encoders=(dataclasses.replace(TEXT, max_length=12),),
        sampler=dataclasses.replace(MODEL.sampler, time_shift=None),
    )
    made = dataclasses.replace(make_components(config), vocabulary=None)
    sharpen(made)
    return made


def sharpen(made):
    """Let attention choose and gates count, as trained ones do, and keep colours in their range.

    Otherwise a picture hides what is wrong in the network.
    """
    changed = []
    for name, value in tree_flatten(made.transformer.parameters()):
        if re.search(r"self_attention\.[qk]_norm.*weight", name):
            value = 2 * value
        if re.search(r"blocks.*modulation.*weight", name):
            value = value + 3 * mx.array([0, 0, 1, 0, 0, 1])[:, None]
        changed.append((name, value))
    made.transformer.update(tree_unflatten(changed))
    out = made.autoencoder.decoder.out
    out.weight = 0.3 * out.weight


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
    """Exports the model with the options given, once."""
    require("torch")
    try:
        libraries.import_coremltools()
    except UserError as error:
        pytest.skip(str(error))

    @functools.cache
    def export(settings=ExportSettings()):  # noqa: B008  it is frozen
        folder = tmp_path_factory.mktemp("coreml") / "packages"
        with pytest.MonkeyPatch.context() as patch:
            for module in (palettes, exporter):
                patch.setattr(module, "LEAST", LEAST)
            exporter.export_coreml(model, folder, settings)
        return folder

    return export


def run(path, **inputs):
    from convert.mil.execution import run

    return run(path, {name: np.array(value) for name, value in inputs.items()})


def assert_close(actual, expected, tolerance):
    expected = np.array(expected)
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def transformer_inputs(model, prompt: str | None = "a red apple"):
    """Of the network in MLX."""
    encoder = model.text_encoders[0]
    text, mask = encode_prompts([prompt], [encoder], transformer=model.transformer)
    x_t = mx.random.normal((1, 12, 8, 4), key=mx.random.key(1))
    return x_t, mx.array([0.7315]), text, mask


def velocity_of(folder, x_t, t, text, mask, function=None):
    return np.array(packages.Packages(folder, function).velocity(x_t, t, text, mask))


def test_absent_text_is_what_mlx_makes_of_it(export, model):
    """In fp16 whole, and in float32 in chunks."""
    inputs = transformer_inputs(model, None)
    expected = model.transformer(*inputs)
    assert float(mx.abs(expected - model.transformer(*transformer_inputs(model))).max()) > 0.05
    for settings, tolerance in ((ExportSettings(), 1e-2), (IN_CHUNKS, 1e-4)):
        folder = export(settings)
        found = packages.Packages(folder)
        assert_close(velocity_of(folder, *inputs), expected, tolerance)
        text, mask = found.encode([None, "a red apple"])
        assert_close(np.array(found.velocity(*inputs[:2], text[:1], mask[:1])), expected, tolerance)
        assert mask[1].any()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_packages_compute_what_mlx_does(export, model, prompt):
    folder, encoder = export(), model.text_encoders[0]
    tokens, mask = encoder.tokenize([prompt])
    inputs = transformer_inputs(model, prompt)
    x_t, _, text, _ = inputs
    (actual,) = run(folder / "TextEncoder_0.mlpackage", tokens=tokens, mask=mask).values()
    # What padding says is nobody's business.
    counts = np.array(mask)[0]
    assert_close(actual[0, :, 0].T[counts], text[0][: counts.sum()], 1e-2)
    assert_close(velocity_of(folder, *inputs), model.transformer(*inputs), 1e-2)
    found = run(folder / "Decoder.mlpackage", latents=x_t.transpose(0, 3, 1, 2))["picture"]
    assert_close(found.transpose(0, 2, 3, 1), model.autoencoder.decode(x_t), 1e-2)


def test_a_decoder_of_alpha_and_semantic_latents_computes_what_mlx_does(model, export, tmp_path):
    export()  # skips without the libraries
    config = dataclasses.replace(
        model.autoencoder.config,
        picture_channels=4,
        latent_channels=34,
        latents_mean=(0.1,) * 34,
        latents_std=(1.5,) * 34,
        # More rows than float16 can count; the last ones are of a LoRA's thing.
        semantics=SemanticConfig(
            149, (2, 16, 23), appearance_channels=8, paint_width=6, own=(200,)
        ),
    )
    network = dataclasses.replace(model.transformer.config, latent_channels=34)
    changed = dataclasses.replace(
        model.config, autoencoder=config, transformer=network, image_size=(64, 64)
    )
    made = dataclasses.replace(make_components(changed), vocabulary=None)
    sharpen(made)
    randomize(made.autoencoder.decoder, 3)
    exporter.export_coreml(made, tmp_path / "packages", ExportSettings())
    # Which codes are there must not depend on rounding.
    things = (200, 3, 2, 0, 0), (70, 11, 2, 5, 1), (3, 0, 2, 4, 6), (8, 2, 2, 2, 3)
    known = semantic_map_of(things, (8, 8), config=config.semantics, wrong=6)
    known[0, 5:, :3, GROUND] = 0
    appearance = np.random.default_rng(2).normal(size=(1, 8, 8, 6))
    latents = np.concatenate([appearance, known], -1)
    latents = (mx.array(latents.astype(np.float32)) - 0.1) / 1.5
    given = {"latents": latents.transpose(0, 3, 1, 2)}
    found = run(tmp_path / "packages" / "Decoder.mlpackage", **given)["picture"]
    assert found.shape == (1, 4, 64, 64)
    assert_close(found.transpose(0, 2, 3, 1), made.autoencoder.decode(latents), 1e-2)


def test_widths_and_chunks_are_the_whole(export, model):
    """In float32, two widths in tiles and two chunks are what MLX computes at each width."""
    folder = export(IN_CHUNKS)
    names = {path.stem for path in folder.glob("*.mlpackage")}
    assert names == {"Transformer_0", "Transformer_1", "Decoder", "TextEncoder_0"}
    inputs = transformer_inputs(model)
    for width, function in zip(model.config.transformer.widths, WIDTHS, strict=True):
        expected = model.transformer(*inputs, share=width)
        assert_close(velocity_of(folder, *inputs, function), expected, 1e-4)
    default = velocity_of(folder, *inputs)
    np.testing.assert_array_equal(default, velocity_of(folder, *inputs, "full"))
    packages = json.loads((folder / "report.json").read_text())["packages"]
    sizes = [packages[f"Transformer_{i}"]["weight_bytes"] for i in range(2)]
    whole = json.loads((export() / "report.json").read_text())["packages"]["Transformer"]
    # fp16 there; what is not shared, the modulation, is more of a small network than of a large.
    assert sum(sizes) < 1.15 * 2 * whole["weight_bytes"]
    assert min(sizes) > 0.3 * sum(sizes)


def test_palettes_are_what_mlx_computes_with_them(export, model):
    """At each of the widths, which share them."""
    folder = export(PALETTES)
    report = json.loads((folder / "report.json").read_text())
    layers = report["quantization"]["layers"]
    bits = {path: layer["bits"] for path, layer in layers.items()}
    assert set(bits.values()) == {4, 8}
    worst = max(layers, key=lambda path: layers[path]["mse"])
    assert bits[worst] == 8
    package = report["packages"]["Transformer"]
    assert set(package["functions"]) == set(WIDTHS)
    assert package["palettized_weights"] == package["palettes"] > 0
    assert 4.5 < package["bits_per_index"] <= 5.5
    assert report["packages"]["Decoder"]["palettes"] == 0
    inputs = transformer_inputs(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(palettes, "LEAST", LEAST)
        chosen, most, least = (
            palettes.with_palettes(model.transformer, some)
            for some in (bits, dict.fromkeys(bits, 8), dict.fromkeys(bits, 4))
        )
    for share, function in zip(model.config.transformer.widths, WIDTHS, strict=True):
        found = velocity_of(folder, *inputs, function)
        assert_close(found, chosen(*inputs, share=share), 1e-2)
    # The palettes are seen in the result, and the larger ones among them help.
    x_t = mx.random.normal((8, 12, 8, 4), key=mx.random.key(2))
    batch = x_t, mx.linspace(0.1, 0.9, 8), *(mx.repeat(value, 8, 0) for value in inputs[2:])
    expected = model.transformer(*batch)
    small, medium, large = (
        (network(*batch) - expected).square().mean().item() ** 0.5
        for network in (most, chosen, least)
    )
    assert 10 * small < medium < 0.95 * large


@pytest.mark.parametrize(("distinct", "entries"), [(2, 2), (5, 8), (16, 16), (17, 64), (256, 256)])
def test_a_palette_has_each_value_once(distinct, entries):
    """Also of weights that NumPy 2.3 does not sort on some CPUs."""
    rng = np.random.default_rng(0)
    values = np.sort(rng.choice(2**12, distinct, replace=False)) / np.float16(64) - 32
    for count in (300, 6144, 50000):
        weight = values.astype(np.float16)[rng.permutation(count) % distinct].reshape(-1, 4)
        palette, indices = package.palette_of(weight)
        assert palette.dtype == np.float16 and len(palette) == entries
        assert np.array_equal(palette[indices].reshape(weight.shape), weight)
        assert np.array_equal(np.unique(indices), np.arange(distinct))


def test_the_report_tells_what_is_in_the_packages(export, model):
    folder = export()
    report = json.loads((folder / "report.json").read_text())
    assert (report["widths"], report["height"], report["image_width"]) == ("full", 96, 64)
    assert report["not_exported"] == []
    # The phone reads a number, that of the exported size.
    stored = json.loads((folder / "config.json").read_text())
    assert stored["sampler"]["time_shift"] == 1.0
    assert set(report["versions"]) == {"mlx_snapgen", "coremltools", "torch", "numpy", "python"}
    transformer = report["packages"]["Transformer"]
    counts = transformer["functions"]["main"]["operations"]
    heads, sparse, dense, bands = 2, 2, 2, 3
    # In a sparse block every head attends to cells, to the text and in each band; the others have
    # no bands but attend to all.
    attentions = heads * (sparse * (2 + bands) + dense * 2)
    assert counts["softmax"] == attentions
    assert counts["einsum"] == 2 * attentions
    # All heads turn their keys at once.
    assert counts["transpose"] <= 3 * sparse + 2 * dense + 2
    assert counts["reshape"] <= 10 * sparse + 5 * dense + 10
    assert transformer["weight_bytes"] > transformer["parameters"] * 2
    names = {"Transformer.mlpackage", "Decoder.mlpackage", "TextEncoder_0.mlpackage"}
    files = {"config.json", "report.json", "tokenizer_0.model"}
    assert {path.name for path in folder.iterdir()} == names | files
    assert not list(folder.rglob("executorch*"))
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        exporter.export_coreml(model, folder, ExportSettings())


# --- whole pictures -----------------------------------------------------------------------------


def drawn(components):
    (picture,) = SnapGenPipeline(components)("a red apple", seed=3)
    return np.asarray(picture)


@pytest.fixture(scope="module")
def picture(export):
    return packages.Packages(export()).draw("a red apple", seed=3)


def changed(model, **settings):
    """The model with another transformer of the same weights, at full width."""
    alone = exporter.of_width(model, "full")
    config = dataclasses.replace(alone.transformer.config, **settings)
    network = EfficientDiT(config)
    network.update(alone.transformer.parameters())
    config = dataclasses.replace(alone.config, transformer=config)
    return dataclasses.replace(alone, config=config, transformer=network)


def test_the_packages_alone_draw_the_picture(picture, model):
    ratio = psnr(np.asarray(picture), drawn(changed(model)))
    packages.check_picture(ratio)
    assert np.asarray(picture).std() > 5


def test_one_step_tells_packages_from_others(export, model, monkeypatch, capsys):
    def compare(folder, other):
        monkeypatch.setattr(packages, "load_pretrained", lambda *a, **k: other)
        command = ["coreml_picture", str(folder), "a cat", "--model", "model", "--one-step"]
        found = SimpleNamespace(open=lambda name: SimpleNamespace(path=Path(name)))
        monkeypatch.setattr(comparison, "ModelFolder", found)
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()  # what the export said
        comparison.main()
        return float(re.match(r"velocity: ([\d.]+) dB", capsys.readouterr().out)[1])

    same = changed(model)
    whole = compare(export(IN_CHUNKS), same)
    assert compare(export(), same) + 20 < whole
    with pytest.raises(UserError, match="compute another velocity than MLX"):
        compare(export(), with_gates(model, 1.05))
    assert compare(export(PALETTES), same) < 40


def with_gates(model, factor):
    """Gates of self-attention and feed-forward times `factor`."""
    made = changed(model)
    network = made.transformer
    rows = mx.array([1, 1, factor, 1, 1, factor])[:, None]
    for blocks in (network.down_blocks, network.middle_blocks, network.up_blocks):
        for block in blocks:
            table = block.modulation.members[0]
            table.weight = table.weight * rows
    linear = network.time.members[0].linear
    d = network.config.hidden_size
    linear.weight = linear.weight * mx.repeat(rows, d, 0)
    linear.bias = linear.bias * mx.repeat(rows[:, 0], d)
    return made


@pytest.mark.parametrize(
    "broken",
    [
        lambda model: changed(model, rope_theta=100.0),
        lambda model: changed(model, band_radius=0),
        lambda model: with_gates(model, 1.1),
    ],
    ids=["RoPE", "band radius", "gates"],
)
def test_a_wrong_network_draws_another_picture(broken, picture, model):
    with pytest.raises(UserError, match="the packages generate another picture than MLX"):
        packages.check_picture(psnr(np.asarray(picture), drawn(broken(model))))


def test_a_part_without_a_twin_is_left_out(model):
    require("torch")
    from convert.pytorch.weights import torch_networks, without_twin

    alone = exporter.of_width(model, "full")
    gemma = TextEncoderConfig(kind="gemma", hidden_size=16)
    config = dataclasses.replace(alone.config, text_encoders=(gemma,))
    networks = torch_networks(dataclasses.replace(alone, config=config))
    assert set(networks) == {"transformer", "decoder"}
    assert without_twin(model, networks) == ["text_encoder_0"]


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._prims":
            os.kill(os.getpid(), signal.SIGINT)
            print("the import goes on", flush=True)

sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_while_torch_is_imported_has_no_traceback(model_folder, tmp_path):
    """An exception at a random moment of the import breaks torch, or crashes the process."""
    pytest.importorskip("torch")
    pytest.importorskip("coremltools")
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", "convert.coreml", model_folder, tmp_path / "new"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "the import goes on\n")
    assert done.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
