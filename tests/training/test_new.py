"""`train.new`: untrained model folders of any size, autoencoder and text encoders."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.checkpoint.model import load_autoencoder, load_pretrained, save_pretrained
from mlx_snapgen.checkpoint.module import FORMAT_VERSION
from mlx_snapgen.config import SamplerConfig, to_dict
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.autoencoders.registry import make_autoencoder
from tests import tiny
from tests.runtime.test_clip import MERGES, write_folder
from train import new

SIZES = {
    "hidden_size": 64,
    "head_dim": 8,
    "num_cross_kv_heads": 4,
    "blocks": [1, 2, 1],
    "num_bands": 2,
    "text_width": 32,
    "frequency_dim": 16,
}


@pytest.fixture
def run(monkeypatch):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["new", *map(str, options)])
        new.main()

    return call


def write_autoencoder(folder, config):
    """What convert.from_torch writes."""
    folder.mkdir()
    values = {"format_version": FORMAT_VERSION, "part": "autoencoder", "quantization": None}
    (folder / "config.json").write_text(json.dumps(values | {"autoencoder": to_dict(config)}))
    model = tiny.randomize(make_autoencoder(config), 3)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "autoencoder.safetensors"), weights)
    return folder


@pytest.fixture
def parts(tmp_path):
    """Files of all parts: sizes, Qwen-Image's autoencoder, a CLIP and a tokenizer."""
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES))
    (tmp_path / "own.model").write_bytes(tiny.tokenizer_bytes())
    write_autoencoder(tmp_path / "qwen", tiny.QWEN_AUTOENCODER)
    write_folder(tmp_path / "clip", tiny.make_clip(MERGES, 48, num_heads=3), "hugging face")
    return tmp_path


def options(parts, *more):
    named = {"--preset": "sizes.json", "--autoencoder": "qwen", "--text-encoder": "clip"}
    given = [word for name, file in named.items() for word in (name, parts / file)]
    return [*given, "--tokenizer", parts / "own.model", *more]


def test_a_model_of_all_kinds_of_parts(parts, run, capsys):
    run(parts / "out", *options(parts, "--encoder-size", 32, "--encoder-layers", 1))
    model = load_pretrained(parts / "out")
    config = model.config
    assert config.transformer.text_dims == (48, 32)
    assert config.transformer.latent_channels == 4
    assert config.transformer.widths == (1.0, 0.5, 0.375)
    assert config.unconditional == "absent"
    assert config.sampler == SamplerConfig(28, 4.0, None)
    assert config.image_size == (256, 256)
    clip, own = config.text_encoders
    assert (clip.kind, clip.source) == ("clip", str((parts / "clip").resolve()))
    assert (own.kind, own.source, own.vocab_size) == ("transformer", None, tiny.VOCAB_SIZE)
    assert (own.hidden_size, own.num_layers, own.max_length) == (32, 1, 64)
    assert not (parts / "out" / "text_encoder_0.safetensors").exists()
    before = dict(tree_flatten(load_autoencoder(parts / "qwen").parameters()))
    for name, value in tree_flatten(model.autoencoder.parameters()):
        np.testing.assert_array_equal(np.array(value), np.array(before[name]), err_msg=name)
    said = capsys.readouterr().out
    assert "transformer, small" in said and "text encoder 1" in said
    assert f"train.flow --model {parts / 'out'} --data {parts / 'out'}-data" in said


def test_the_same_seed_gives_the_same_bytes(parts, run):
    run(parts / "a", *options(parts))
    run("-o", parts / "b" / "a", *options(parts))
    run(parts / "c" / "a", *options(parts, "--seed", 1))
    files = sorted(path.name for path in (parts / "a").iterdir())
    for name in files:
        assert (parts / "a" / name).read_bytes() == (parts / "b" / "a" / name).read_bytes(), name
    weights = [(parts / x / "transformer.safetensors").read_bytes() for x in ("a", "c/a")]
    assert weights[0] != weights[1]


def test_sizes_of_another_model(parts, model_folder, run):
    run(parts / "out", *options(parts, "--preset", model_folder, "--resolution", 64))
    config = load_pretrained(parts / "out").config
    assert config.transformer.blocks == tiny.TRANSFORMER.blocks
    assert config.sampler == tiny.MODEL.sampler
    assert config.text_encoders[1].hidden_size == tiny.MODEL.text_encoders[0].hidden_size
    assert config.image_size == (64, 64)


def test_the_preset_of_the_built_in_model(components, parts, run):
    save_pretrained(parts / "model", components)
    common = ["--preset", "stickers", "--autoencoder", parts / "model"]
    run(parts / "out", *common, "--tokenizer", parts / "own.model")
    config = load_pretrained(parts / "out").config
    assert (config.image_size, config.unconditional) == ((128, 128), "empty prompt")
    assert config.sampler == SamplerConfig(28, 2.0, 4.0)
    assert config.text_encoders[0].max_length == 24


def test_gemma_is_used_from_its_folder(parts, run):
    mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install -e '.[gemma]'")
    from tests.runtime.test_gemma import write_gemma

    write_gemma(parts / "gemma", mlx_lm)
    encoders = ["--text-encoder", parts / "gemma", parts / "clip"]
    run(parts / "out", *options(parts)[:4], *encoders)
    gemma, clip = load_pretrained(parts / "out").config.text_encoders
    assert (gemma.kind, gemma.hidden_size, gemma.num_layers) == ("gemma", 24, 3)
    assert gemma.source == str((parts / "gemma").resolve())
    assert clip.kind == "clip"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "smal"], "no such preset, file or model folder .did you mean 'small'"),
        (["--preset", "own.model"], "cannot read"),
        (["--autoencoder", "raw"], r"python -m convert\.from_torch .*raw --output OUT`"),
        (["--autoencoder", "pipe"], r"python -m convert\.from_torch .*pipe --output OUT --sub"),
        (["--text-encoder", "nowhere"], "no model folder nowhere"),
        (["--tokenizer", "nothing"], "cannot read the tokenizer"),
        (["--resolution", "100"], "100x100 do not divide by 32"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--encoder-size", "0"], "0 is not between"),
    ],
)
def test_mistakes_are_one_line(parts, run, monkeypatch, more, message):
    monkeypatch.chdir(parts)
    for name, file in (("raw", "config.json"), ("pipe", "model_index.json")):
        (parts / name).mkdir()
        (parts / name / file).write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UserError, match=message):
        run(parts / "out", *options(parts, *more))
    assert not (parts / "out").exists()


def test_a_model_needs_a_text_encoder_and_a_new_folder(parts, run):
    with pytest.raises(UserError, match="needs a text encoder"):
        run(parts / "out", *options(parts)[:4])
    with pytest.raises(UserError, match="exists already"):
        run(parts / "clip", *options(parts))
    with pytest.raises(UserError, match="name the output once"):
        run(*options(parts))
