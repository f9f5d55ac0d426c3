"""Converting a Gemma 3: the same folder as mlx-lm's own conversion, and parity with the original.

Needs mlx-lm, the parity test torch besides: `pip install -e ".[parity]"`.
"""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_snapgen.checkpoint.language_models import load_gemma
from mlx_snapgen.errors import UserError
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.source import find_source
from tests.runtime import test_gemma
from tests.runtime.test_gemma import CONFIG, TEXT, write_gemma

TOKENS = [[2, 5, 6, 7, 8, 4, 5]]


@pytest.fixture(scope="module")
def mlx_lm():
    return pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install -e '.[public]'")


@pytest.mark.parametrize("multimodal", [True, False])
def test_the_states_stay_what_they_are(mlx_lm, tmp_path, multimodal):
    folder = write_gemma(tmp_path / "in", mlx_lm, multimodal)
    report = convert(find_source(str(folder)), tmp_path / "out")
    assert report["kind"] == "gemma"
    assert len(report["keys"]["ignored"]) == (2 if multimodal else 0)
    expected, found = (load_gemma(f, CONFIG) for f in (folder, tmp_path / "out"))
    assert mx.array_equal(found(mx.array(TOKENS)), expected(mx.array(TOKENS)))
    assert found.tokenizer.encode("a red apple") == expected.tokenizer.encode("a red apple")


def test_bits_are_those_of_mlx_lms_own_conversion(mlx_lm, tmp_path, monkeypatch):
    for key, value in (("hidden_size", 64), ("intermediate_size", 128), ("head_dim", 32)):
        monkeypatch.setitem(test_gemma.TEXT, key, value)
    folder = write_gemma(tmp_path / "in", mlx_lm, multimodal=False)
    mlx_lm.convert(
        str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=32,
        dtype="float32",
    )  # fmt: skip
    report = convert(
        find_source(str(folder)),
        tmp_path / "ours",
        quantization={"bits": 4, "group_size": 32},
        dtype=mx.float32,
    )
    theirs = mx.load(str(tmp_path / "theirs" / "model.safetensors"))
    ours = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    assert sum(key.endswith(".scales") for key in ours) == len(report["relative_errors"]) == 22
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert mx.array_equal(ours[name], value), name


def test_other_networks_are_refused(mlx_lm, tmp_path):
    folder = write_gemma(tmp_path / "in", mlx_lm, multimodal=False)
    path = folder / "config.json"
    path.write_text(json.dumps(TEXT | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=r"lacks model\.layers\.3\.self_attn\.q_proj\.weight"):
        convert(find_source(str(folder)), tmp_path / "out")
    path.write_text(json.dumps(TEXT | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"misshapes model\.norm\.weight \(24,\) instead of"):
        convert(find_source(str(folder)), tmp_path / "out")
    path.write_text(json.dumps(TEXT | {"quantization_config": {"bits": 4}}))
    with pytest.raises(UserError, match="describes quantized weights"):
        convert(find_source(str(folder)), tmp_path / "out")


@pytest.mark.parametrize("scaled", [False, True])
def test_what_transformers_saves_now_says_the_same(mlx_lm, tmp_path, scaled):
    """Its rotary settings have moved in config.json, where mlx-lm does not look for them."""
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install -e '.[parity]'")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = TEXT | {"rope_theta": 500.0, "rope_local_base_freq": 50.0}
    if not scaled:
        text = {k: v for k, v in text.items() if k != "rope_scaling"}
    theirs = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**text)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "in")
    write_gemma(tmp_path / "words", mlx_lm)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "words" / name).rename(tmp_path / "in" / name)
    convert(find_source(str(tmp_path / "in")), tmp_path / "out")
    found = np.array(load_gemma(tmp_path / "out", CONFIG)(mx.array(TOKENS)))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(TOKENS)).last_hidden_state.numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}")
    assert error < 1e-4
