"""The benchmark: what its tables count, on networks of a few thousand parameters."""

import dataclasses
import itertools
import json
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_snapgen import benchmark, measure, profile
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks import attention, efficient_dit
from mlx_snapgen.networks.elastic import ElasticLinear
from mlx_snapgen.presets import TRANSFORMERS
from tests.tiny import TRANSFORMER

SMALL = dataclasses.replace(
    TRANSFORMER, widths=(1.0,), blocks=(2, 3, 1), latent_channels=16, text_dims=(16, 16)
)
HOW = {"height": 64, "width": 64, "dtype": mx.float32}


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setitem(TRANSFORMERS, "small", SMALL)

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--preset", "small", *options])
        benchmark.main()
        return capsys.readouterr().out

    return call


def test_a_profile_has_every_operation_of_the_network(monkeypatch):
    monkeypatch.setitem(TRANSFORMERS, "small", SMALL)
    _, step = measure.make_step("small", **HOW, length=8)
    before = mx.array(step())
    functions = [owner.__dict__[name] for some in profile.KINDS.values() for owner, name in some]
    parts = profile.profile(step)
    again = [owner.__dict__[name] for some in profile.KINDS.values() for owner, name in some]
    assert again == functions and mx.array_equal(step(), before)
    assert list(parts) == [*profile.KINDS, profile.OTHERS]
    network = efficient_dit.EfficientDiT(SMALL)
    linear = [m for _, m in network.named_modules() if isinstance(m, (ElasticLinear, nn.Linear))]
    # The two text projections ran before.
    assert parts["products"].calls == len(linear) - 2
    sparse, dense = 3, 3
    calls = {kind: part.calls for kind, part in parts.items()}
    assert calls["attention in bands"] == sparse
    assert calls["attention to all"] == 2 * sparse + 2 * dense  # with that to the text
    assert calls["norms"] == 2 * 6 + 1 + 2 * 6
    assert calls["activations"] == 6 + 2
    assert calls["RoPE"] == 3 * sparse + 2 * dense
    # A hidden layer of the FFN: Down and Up have 16 tokens, Middle 4.
    ratios = {16: SMALL.ffn_ratio[0], 4: SMALL.ffn_ratio[1]}
    for tokens, ratio in ratios.items():
        shape = (1, tokens, round(SMALL.hidden_size * ratio))
        assert parts["activations"].shapes[shape] == 3
    assert all(part.seconds >= 0 for kind, part in parts.items() if kind != profile.OTHERS)
    lines = profile.table(parts).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [*parts, "sum"]
    assert lines[-1].endswith("100.0%")


def test_a_step_is_compared_with_its_products():
    parts = {"products": profile.Part(2.0), profile.OTHERS: profile.Part(4.0)}
    flops = {"linear layers": 8.0, "attention": 4.0}
    assert profile.times_its_products(4.5, parts, flops) == 1.5


def test_the_seconds_of_a_profile_are_medians():
    ends = itertools.chain.from_iterable((0, 0, s, s) for s in (1, 9, 2))
    network = nn.Linear(4, 4)
    parts = profile.profile(
        lambda: network(mx.ones((2, 4))), repeats=3, clock=lambda: float(next(ends))
    )
    assert parts["products"].seconds == 2 and parts["products"].calls == 1


def test_the_parts_of_a_profile_add_up_to_the_step():
    """With a clock that counts its own ticks, no time is lost or counted twice."""
    ticks = iter(range(10**6))
    network = nn.Linear(4, 4)
    parts = profile.profile(lambda: network(network(mx.ones((2, 4)))), clock=lambda: next(ticks))
    assert parts["products"].seconds == 2 and parts["products"].shapes == {(2, 4): 2}
    assert parts[profile.OTHERS].seconds == 3  # between five ticks of the step and its products
    assert sum(part.seconds for part in parts.values()) == 5


def test_flops_are_those_of_the_products():
    layer = nn.Linear(6, 5)
    q, k = mx.zeros((1, 4, 10, 8)), mx.zeros((1, 2, 7, 8))
    flops = profile.count_flops(lambda: (layer(mx.zeros((3, 6))), attention.attend_all(q, k, k)))
    assert flops == {"linear layers": 2 * 3 * 6 * 5, "attention": 4 * 4 * 10 * 7 * 8}


def test_profiles_and_cpu_seconds_are_options(run):
    out = json.loads(run("--size", "64", "--profile", "--json"))
    assert list(out["seconds"]["small"]) == [*profile.KINDS, profile.OTHERS, "step"]
    machine, title, *_ = run("--size", "64", "--profile", "--cpu-seconds").splitlines()
    assert title.startswith("small, 64x64 px")
    assert machine.startswith(out["machine"]["name"]) and f"mlx {mx.__version__}" in machine
    result = json.loads(run("--size", "64", "--repeats", "1", "--json"))["presets"]["small"]
    assert result["flops"] > 0 and result["peak_bytes"] > 0


def test_ratios_are_to_the_own_twin_and_to_public_networks():
    seconds = {"small": 3.0, "small-f32": 0.1, "small-pytorch": 2.0, "sana-0.6b": 4.0}
    results = {name: {"seconds": value} for name, value in seconds.items()}
    assert benchmark.ratios_to_peers(results).splitlines() == [
        "seconds of small: 1.5 times small-pytorch, 0.75 times sana-0.6b",
        "seconds of small-f32: 0.025 times sana-0.6b",
    ]
    assert not benchmark.ratios_to_peers({"small": {"seconds": 1.0}})


@pytest.mark.parametrize(
    "options",
    [
        ("--profile", "--preset", "dense-block"),
        ("--profile", "--suite", "blocks"),
        ("--profile", "--suite", "peers", "--preset", "small-pytorch"),
        ("--suite", "memory", "--preset", "dense-block"),
    ],
)
def test_a_table_of_networks_is_not_empty(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    with pytest.raises(UserError, match="is no preset of a whole network"):
        benchmark.main()


@pytest.mark.parametrize(
    ("suite", "option"),
    [
        ("memory", "--profile"),
        ("memory", "--cpu-seconds"),
        ("memory", "--repeats=5"),
        ("training", "--profile"),
        ("training", "--size=64"),
        ("training", "--preset=small"),
    ],
)
def test_a_suite_refuses_options_without_effect(monkeypatch, suite, option):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--suite", suite, option])
    with pytest.raises(UserError, match=f"leave it out with --suite {suite}"):
        benchmark.main()


def test_memory_is_measured_in_a_process_for_each_row(run, monkeypatch):
    started = []

    def start(command, **_):
        started.append(command[3:])
        peak = {"peak_bytes": 1 << 20, "process_bytes": 2 << 20}
        return subprocess.CompletedProcess(command, 0, json.dumps(peak))

    monkeypatch.setattr(measure.subprocess, "run", start)
    rows = json.loads(run("--suite", "memory", "--json"))["rows"]
    kinds = [(row["size"], row["type"]) for row in rows]
    assert kinds == [(px, t) for px in (256, 512, 1024) for t in measure.MEMORY_TYPES]
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    measured = [k for k in kinds if not (on_cpu and k[1] == "bfloat16")]
    assert [(int(px), kind) for _, px, kind in started] == measured
    sizes = {row["type"]: row["estimate"] for row in rows if row["size"] == 1024}
    assert sizes["4 bits"] < sizes["8 bits"] < sizes["bfloat16"] < sizes["float32"]
    _, *table = run("--suite", "memory", "--size", "512").splitlines()
    assert len(table) == 1 + 4 and table[1].split()[:5] == ["small", "512", "float32", "1", "2"]
    if on_cpu:
        assert table[2].split()[3:5] == ["-", "-"]


def test_what_the_system_ends_is_a_row_without_measures(run, monkeypatch):
    def start(command, **_):
        return subprocess.CompletedProcess(command, -9 if command[-1] == "float32" else 1, "")

    monkeypatch.setattr(measure.subprocess, "run", start)
    with pytest.raises(subprocess.CalledProcessError):  # 8 bits end with a fault of their own
        run("--suite", "memory", "--size", "256")
    monkeypatch.setattr(measure, "MEMORY_TYPES", ("float32",))
    *_, line = run("--suite", "memory", "--size", "256").splitlines()
    assert line.split()[:5] == ["small", "256", "float32", "-", "-"]


def test_the_peak_of_a_process_includes_the_weights(monkeypatch, capsys):
    limit = mx.set_cache_limit(0)
    monkeypatch.setitem(TRANSFORMERS, "small", SMALL)
    try:
        found = []
        for kind in ("float32", "8 bits"):
            measure.print_peak("small", "64", kind)
            found.append(json.loads(capsys.readouterr().out))
    finally:
        mx.set_cache_limit(limit)
    weights = 4 * efficient_dit.count_parameters(SMALL)
    assert found[0]["peak_bytes"] > weights and found[0]["process_bytes"] > weights


def test_a_prompt_is_as_long_as_the_text_encoders_take():
    names = ("stickers", "stickers-pytorch", "small", "small-pytorch", "sana-0.6b")
    assert [measure.text_tokens(name, 300) for name in names] == [24, 24, 300, 300, 300]
    assert measure.text_tokens("small") == 2 * 77
