"""The suite `peers` of the benchmark: our network beside PyTorch's, at small sizes."""

import dataclasses
import json
import sys
from importlib import metadata

import pytest

from mlx_snapgen import benchmark, measure
from mlx_snapgen.errors import UserError
from mlx_snapgen.presets import TRANSFORMERS
from tests.tiny import TRANSFORMER, require

SMALL = dataclasses.replace(TRANSFORMER, widths=(1.0,))


@pytest.fixture
def run(monkeypatch, capsys):
    for name in ("small", "small-f32"):
        config = dataclasses.replace(SMALL, patch_size=1 if name.endswith("f32") else 2)
        monkeypatch.setitem(TRANSFORMERS, name, config)

    def call(*options):
        given = ["benchmark", "--repeats", "1", "--size", "64", *options]
        monkeypatch.setattr(sys, "argv", given)
        benchmark.main()
        return capsys.readouterr()

    return call


def test_peers_take_turns_and_are_compared_with_the_first(run, monkeypatch):
    require("torch", "diffusers")
    from convert import peers

    sana = {"num_layers": 1, "num_attention_heads": 2, "num_cross_attention_heads": 2}
    sana |= {"cross_attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": 16}
    monkeypatch.setattr(peers, "SANA", dict.fromkeys(peers.SANA, sana))
    pixart = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    pixart |= {"cross_attention_dim": 16, "caption_channels": 16}
    monkeypatch.setattr(peers, "PIXART", peers.PIXART | pixart)
    out = json.loads(run("--suite", "peers", "--json").out)
    assert list(out["presets"]) == list(benchmark.SUITES["peers"])
    for name, found in out["presets"].items():
        assert found["seconds"] > 0 and found["parameters"] > 1000, name
    count = {name: found["parameters"] for name, found in out["presets"].items()}
    assert count["small-pytorch"] == count["small"] != count["sana-0.6b"]
    table = run("--suite", "peers", "--preset", "small-f32", "--preset", "small-f32-pytorch").out
    *_, ours, twin, ratios = table.splitlines()
    assert ours.startswith("small-f32 ") and " 1.00x" in ours
    assert twin.startswith("small-f32-pytorch ")
    assert ratios.startswith("seconds of small-f32: ")
    assert ratios.endswith(" times small-f32-pytorch")


def test_the_default_model_has_a_twin(run, monkeypatch):
    require("torch")
    options = ("--preset", "stickers", "--preset", "stickers-pytorch", "--json")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    found = json.loads(run("--suite", "peers", *options).out)
    ours, twin = found["presets"].values()
    assert ours["parameters"] == twin["parameters"]
    assert found["machine"]["torch"] == f"{metadata.version('torch')} (1 thread)"


def test_what_is_not_installed_is_skipped(run, monkeypatch):
    find = measure.importlib.util.find_spec
    monkeypatch.setattr(
        measure.importlib.util, "find_spec", lambda n: None if n == "torch" else find(n)
    )
    said = run("--suite", "peers")
    assert [line.split()[0] for line in said.out.splitlines()[3:]] == ["small-f32", "small"]
    assert "small-pytorch is skipped: it needs torch" in said.err
    assert '(pip install -e ".[parity]" in the repository)' in said.err


def test_nothing_left_to_measure_is_an_error(run, monkeypatch):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="nothing is left to measure"):
        run("--suite", "peers", "--preset", "small-pytorch")


def test_a_network_that_does_not_fit_is_named(run, monkeypatch):
    def step():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(measure, "as_drawn", lambda *_: step)
    with pytest.raises(UserError, match="small needs more memory than there is"):
        run("--suite", "peers", "--preset", "small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "peers", "--preset", "sana-1.7b"), "did you mean 'sana-1.6b'"),
        (("--suite", "peers", "--preset", "dense-block"), "no preset 'dense-block'"),
        (("--preset", "small-pytorch"), "no preset 'small-pytorch': it is in the suite peers"),
    ],
)
def test_presets_of_other_suites_are_told(run, options, message):
    with pytest.raises(UserError, match=message):
        run(*options)


def test_bad_input_is_one_line(run):
    with pytest.raises(UserError, match="small-f32: picture sides must be multiples of 64, got 96"):
        run("--preset", "small-f32", "--height", "96")
    with pytest.raises(UserError, match=r"no preset 'sana-0\.6b'"):
        run("--preset", "sana-0.6b")
    assert "small" in run("--preset", "small").out
