"""Gemma 3 as a text encoder: loading, padding, quantized folders, and parity with the original.

Needs mlx-lm (`pip install -e ".[public]"`), the parity tests torch besides (`".[parity]"`).
"""

import dataclasses
import json
import shutil
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.checkpoint.language_models import load_gemma, load_qwen
from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.config import TextEncoderConfig
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.text_encoders.qwen import QWEN_IMAGE
from mlx_snapgen.presets import GEMMA_3_4B
from mlx_snapgen.public.keys.gemma import gemma_config
from tests.tiny import states_error, with_text_encoder

# sqrt(24) is not what bfloat16 makes of it; two of three layers see a window of 4 tokens only.
TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rms_norm_eps": 1e-6,
}
CONFIG = TextEncoderConfig(
    kind="gemma", vocab_size=64, hidden_size=24, num_layers=3, num_heads=4, max_length=11
)
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "red", "apple", "blue", "car"]


@pytest.fixture(scope="module")
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install -e '.[public]'")


def write_gemma(folder, mlx_lm, multimodal=True, quantize=None, words=WORDS):
    """A random Gemma 3 as Google and mlx-community publish it, with a tokenizer of few words."""
    from mlx_lm.models import gemma3_text
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(TEXT))
    mx.random.seed(7)
    scaled = {
        k: 0.3 * mx.random.normal(v.shape)
        for k, v in tree_flatten(model.parameters())
        if not k.startswith("lm_head")
    }
    model.load_weights(list(scaled.items()), strict=False)
    config = {"model_type": "gemma3", "text_config": TEXT, "vocab_size": 64} if multimodal else TEXT
    if quantize:
        nn.quantize(model, **quantize)
        config = config | {"quantization": quantize}
    weights = {
        k: v for k, v in tree_flatten(model.parameters()) if quantize or not k.startswith("lm_head")
    }
    if multimodal:
        weights = {f"language_model.{k}": v for k, v in weights.items()}
        if not quantize:
            weights["vision_tower.vision_model.embeddings.patch_embedding.bias"] = mx.zeros(3)
            weights["multi_modal_projector.mm_soft_emb_norm.weight"] = mx.zeros(3)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    marks["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    return folder


@pytest.fixture(scope="module")
def folder(mlx_lm, tmp_path_factory):
    return write_gemma(tmp_path_factory.mktemp("gemma") / "tiny [x]", mlx_lm)


def test_a_prompt_is_padded_on_the_right_after_its_mark(folder):
    encoder = load_gemma(folder, CONFIG)
    tokens, mask = encoder.tokenize(["", "a red apple", " ".join(["blue"] * 20) + " car"])
    assert tokens[0].tolist() == [2] + [0] * 10
    assert tokens[1].tolist() == [2, 4, 5, 6] + [0] * 7
    assert mask.sum(axis=1).tolist() == [1, 4, 11]
    assert encoder.tokenizer.cut("blue " * 10 + "red car") == "red car"
    assert encoder.tokenizer.cut("a red apple") == ""
    assert encoder.tokenizer.unknown("a red apple") == []


def test_padding_changes_no_token_before_it(folder):
    encoder = load_gemma(folder, CONFIG)
    tokens, mask = encoder.tokenize(["a red apple", "a"])
    for row in range(2):
        count = mask[row].sum().item()
        alone = encoder(tokens[row : row + 1, :count])[0]
        assert mx.allclose(encoder(tokens, mask)[row, :count], alone, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folders_load_packed_and_say_nearly_the_same(mlx_lm, tmp_path, bits):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    original = dict(TEXT)
    TEXT.update(sizes)
    try:
        exact = write_gemma(tmp_path / "exact", mlx_lm)
        packed = write_gemma(tmp_path / "packed", mlx_lm, quantize={"bits": bits, "group_size": 64})
    finally:
        TEXT.update(original)
    config = dataclasses.replace(CONFIG, hidden_size=64)
    exact, packed = load_gemma(exact, config), load_gemma(packed, config)
    assert "scales" in packed.model.layers[0].mlp.up_proj
    tokens, _ = exact.tokenize(["a red apple"])
    a, b = exact(tokens), packed(tokens)
    error = (mx.abs(a - b).mean() / mx.abs(a).mean()).item()
    assert 0 < error < {4: 0.7, 8: 0.05}[bits]


def test_a_model_names_where_its_gemma_is(components, folder, mlx_lm, tmp_path):
    packed = write_gemma(tmp_path / "packed", mlx_lm, quantize=None)
    for source in (str(folder), "gemma"):
        gemma = load_gemma(packed, dataclasses.replace(CONFIG, source=source))
        made = with_text_encoder(components, gemma)
        model = tmp_path / source.replace("/", "_")
        save_pretrained(model, made)
        assert not (model / "text_encoder_1.safetensors").exists()
        assert not (model / "tokenizer_1.model").exists()
        if source == "gemma":
            packed.rename(model / "gemma")
        loaded = load_pretrained(model).text_encoders[1]
        tokens = mx.array([[2, 5, 6]])
        assert mx.array_equal(loaded(tokens), load_gemma(folder, CONFIG)(tokens))


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_gemma(folder, GEMMA_3_4B),
        lambda folder: load_qwen(folder, QWEN_IMAGE, dims=8),
    ],
)
def test_without_mlx_lm_it_says_what_to_install(tmp_path, monkeypatch, load):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(UserError, match=r"mlx_snapgen\[public\]"):
        load(tmp_path)


def test_folders_that_hold_no_gemma_are_one_line(mlx_lm, folder, tmp_path):
    with pytest.raises(UserError, match="gives states of 24, the model takes those of 2560"):
        load_gemma(folder, GEMMA_3_4B)
    with pytest.raises(UserError, match="cannot load Gemma from") as error:
        load_gemma(tmp_path, CONFIG)
    assert "\n" not in str(error.value)
    odd = shutil.copytree(folder, tmp_path / "odd")
    values = json.loads((odd / "config.json").read_text())
    for pattern in (-3, 10**9):
        values["text_config"]["sliding_window_pattern"] = pattern
        (odd / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"'sliding_window_pattern' cannot be {pattern}"):
            load_gemma(odd, CONFIG)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 2**63}, r"'num_hidden_layers' must be 0 to 4194304, not 9223"),
        ({"num_hidden_layers": 257}, r"config.json: 'num_hidden_layers' must be 0 to 256, not 257"),
        ({"num_hidden_layers": 2.5}, "'num_hidden_layers' must be a whole number, not 2.5"),
        ({"hidden_size": -8}, "'hidden_size' must be 1 to"),
        ({"vocab_size": 10**9}, "'vocab_size' must be 1 to"),
        ({"num_key_value_heads": "2"}, "'num_key_value_heads' must be a whole number"),
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_sizes_out_of_range_are_refused_before_the_network_is_built(
    mlx_lm, folder, tmp_path, monkeypatch, nested, values, words
):
    """mlx-lm builds as many layers as the config has, until no memory is left."""

    def build(*_, **__):
        raise AssertionError("the network is built")

    monkeypatch.setattr("mlx_lm.utils.load_model", build)
    given = {"text_config": TEXT | values} if nested else TEXT | values
    kinds = {"gemma3": lambda: load_gemma(tmp_path, CONFIG)}
    kinds["qwen2_5_vl"] = lambda: load_qwen(tmp_path, QWEN_IMAGE, dims=24)
    kinds["gemma3_text"] = lambda: gemma_config(given, tmp_path / "config.json")
    for kind, load in kinds.items():
        given["model_type"] = kind
        (tmp_path / "config.json").write_text(json.dumps(given))
        with pytest.raises(UserError, match=words):
            load()


PLAIN = {k: v for k, v in TEXT.items() if not k.startswith(("rope", "sliding_window_p"))}
OLD = {"rope_theta": 500.0, "rope_local_base_freq": 50.0}
LINEAR = {"factor": 8.0, "rope_type": "linear"}
LOCAL, WHOLE = {"rope_theta": 50.0}, {"rope_theta": 500.0} | LINEAR
LAYERS = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    "settings",
    [
        LAYERS | {"rope_parameters": {"full_attention": WHOLE, "sliding_attention": LOCAL}},
        LAYERS | OLD | {"rope_parameters": {"full_attention": LINEAR}},
        LAYERS | OLD | {"rope_parameters": {"full_attention": {}}, "rope_scaling": LINEAR},
        LAYERS | OLD | {"sliding_window_pattern": 2, "rope_scaling": LINEAR},
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_rotary_settings_and_layers_are_found_wherever_they_are(mlx_lm, tmp_path, settings, nested):
    """As transformers finds them: mlx-lm reads the names of older versions alone."""
    expected = write_gemma(tmp_path / "old", mlx_lm, nested)
    found = write_gemma(tmp_path / "new", mlx_lm, nested)
    old = PLAIN | OLD | {"sliding_window_pattern": 3, "rope_scaling": LINEAR}
    for folder, text in ((expected, old), (found, PLAIN | settings)):
        values = {"model_type": "gemma3", "text_config": text, "vocab_size": 64}
        (folder / "config.json").write_text(json.dumps(values if nested else text))
    tokens = mx.array([[2, 5, 6, 7, 8, 4, 5]])
    expected, found = (load_gemma(folder, CONFIG)(tokens) for folder in (expected, found))
    assert mx.array_equal(found, expected)
    other = load_gemma(write_gemma(tmp_path / "other", mlx_lm, nested), CONFIG)(tokens)
    assert not mx.allclose(found, other, atol=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_activation": "relu"}, "'hidden_activation' \"relu\" is not supported"),
        ({"attention_bias": True}, "'attention_bias' true"),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' 50.0"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' true"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'rope_type' \"longrope\""),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        (
            {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": {}}},
            "'rope_type' \"linear\"",
        ),
    ],
)
def test_settings_that_mlx_lm_ignores_are_refused(mlx_lm, folder, tmp_path, values, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TEXT | values))
    for read in (lambda: gemma_config(TEXT | values, path), lambda: load_gemma(tmp_path, CONFIG)):
        with pytest.raises(UserError, match=words) as error:
            read()
        assert f"{path}: " in str(error.value) and "\n" not in str(error.value)


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("lengths", [(11,), (13, 5, 1), (2, 3)])
def test_states_equal_those_of_transformers(mlx_lm, tmp_path, multimodal, lengths):
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    folder = write_gemma(tmp_path / "tiny", mlx_lm, multimodal)
    ours = load_gemma(folder, CONFIG)

    # transformers reads the rotary settings of older configs from its own names
    theirs = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**TEXT)).eval()
    prefix = "language_model.model." if multimodal else "model."
    weights = mx.load(str(folder / "model.safetensors"))
    state = {
        k.removeprefix(prefix): torch.tensor(np.array(v))
        for k, v in weights.items()
        if k.startswith(prefix)
    }
    theirs.load_state_dict(state)

    length = max(lengths)
    rng = np.random.default_rng(length)
    tokens = rng.integers(1, 64, (len(lengths), length))
    mask = np.arange(length) < np.array(lengths)[:, None]
    tokens[~mask] = 0
    assert states_error(ours, theirs, tokens=tokens, mask=mask) < 1e-4
