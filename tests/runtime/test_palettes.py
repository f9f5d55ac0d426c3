"""Palettes: k-means, the sensitivity of layers, which of them get more bits, and their file."""

import dataclasses
import json

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.elastic import extract
from mlx_snapgen.quantize import palettes, sensitivity
from tests.tiny import velocity

WIDTHS = {"full": 1.0, "small": 0.5}
AVERAGE = 5.0


def best_error(values, clusters):
    """Of an optimal k-means, by dynamic programming over the sorted values."""
    values = np.sort(values).astype(np.float64)
    n = len(values)
    s, q = (np.concatenate([[0], np.cumsum(v)]) for v in (values, values**2))
    i, j = np.arange(n)[:, None], np.arange(1, n + 1)[None]
    size = np.maximum(j - i, 1)
    cost = np.where(j > i, q[j] - q[i] - (s[j] - s[i]) ** 2 / size, np.inf)
    best = cost[0]
    for _ in range(clusters - 1):
        before = np.concatenate([[0], best])[:n, None]
        best = (before + cost).min(0)
    return best[-1]


@pytest.mark.parametrize("draw", ["normal", "laplace", "uniform"])
def test_k_means_is_nearly_the_best(draw):
    values = getattr(np.random.default_rng(0), draw)(size=600).astype(np.float32)
    for clusters in (4, 16):
        centres = palettes.k_means(values, clusters)
        error = np.square(values[:, None] - centres).min(1).sum()
        assert len(centres) == clusters
        assert error < 1.1 * best_error(values, clusters)


def test_few_numbers_are_kept_exactly():
    values = np.array([3.0, 1.0, 1.0, -2.0], np.float32)
    np.testing.assert_array_equal(palettes.k_means(values, 16), [-2, 1, 3])
    weight = mx.random.normal((64, 1024), key=mx.random.key(0))
    for bits in (4, 8):
        found = np.array(palettes.palettized(weight, bits))
        assert len(np.unique(found)) <= 2**bits
        np.testing.assert_array_equal(found, found.astype(np.float16))
        # Panter and Dite: 2.72 / 2^(2 bits) for a normal distribution.
        assert np.square(found - weight).mean() < 1.2 * 2.72 / 4**bits
        np.testing.assert_array_equal(palettes.palettized(mx.array(found), bits), found)


@pytest.mark.parametrize("width", WIDTHS.values())
def test_a_layer_s_error_is_that_of_its_own_output(components, width, monkeypatch):
    monkeypatch.setattr(palettes, "LEAST", 1000)
    network = components.transformer
    before = tree_flatten(network.parameters())
    found = sensitivity.sensitivities(network, lambda: velocity(network, width))
    assert found.keys() == palettes.layers(network).keys()
    # The modules are back, and so are their weights.
    after = dict(tree_flatten(network.parameters()))
    assert [name for name, _ in before] == list(after)
    assert all(after[name] is value for name, value in before)
    # The head sees what all layers before it have computed without palettes.
    changed = palettes.with_palettes(network, {"head.linear": 4})
    error = velocity(changed, width) - velocity(network, width)
    np.testing.assert_allclose(found["head.linear"], error.square().mean().item(), rtol=1e-3)


def test_four_bits_more_are_sixteen_times_nearer(components):
    """The step between a palette's numbers is, and small errors add up as they are."""
    network = components.transformer
    names = palettes.layers(network)
    errors = []
    for bits in (4, 8):
        made = palettes.with_palettes(network, dict.fromkeys(names, bits))
        errors.append((velocity(made) - velocity(network)).square().mean().item() ** 0.5)
    assert 10 < errors[0] / errors[1] < 25


def test_the_worst_layers_get_more_bits():
    errors = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.0}
    sizes = {"a": 100, "b": 100, "c": 500, "d": 100}
    assert sensitivity.choose_bits(errors, sizes, average=4.0) == dict.fromkeys("abcd", 4)
    assert sensitivity.choose_bits(errors, sizes, average=8.0) == dict.fromkeys("abcd", 8)
    # c is too large for what b leaves.
    assert sensitivity.choose_bits(errors, sizes, average=5.0) == {"a": 4, "b": 8, "c": 4, "d": 8}
    with pytest.raises(UserError, match="4 to 8 bits"):
        sensitivity.choose_bits(errors, sizes, average=3.0)


def test_prompts_are_of_the_model_s_vocabulary():
    words = {"nouns": ["apple", "car"], "colours": ["red", "orange"]}
    assert sensitivity.calibration_prompts(words) == [
        "a red apple",
        "an orange apple",
        "a red car",
        "an orange car",
    ]
    assert sensitivity.calibration_prompts({"nouns": ["egg"]}) == ["an egg"] * 4
    assert sensitivity.calibration_prompts(None) == list(sensitivity.PROMPTS)


@pytest.fixture(scope="module")
def plan(components):
    return sensitivity.choose_palettes(components, AVERAGE, widths=WIDTHS)


@pytest.fixture(scope="module")
def folder(components, plan, tmp_path_factory):
    """The model with palettes."""
    network = palettes.with_palettes(components.transformer, plan.bits)
    made = dataclasses.replace(components, transformer=network)
    folder = tmp_path_factory.mktemp("palettes") / "model"
    save_pretrained(folder, made, texts=palettes.palettes_file(plan))
    return folder


def test_the_average_is_kept_and_used_up(components, plan):
    some = palettes.layers(components.transformer)
    assert plan.bits.keys() == plan.mse.keys() == some.keys()
    assert not any(name.startswith("text") for name in some)
    assert len(some["time.linear"]) == 3
    sizes = {name: layers[0].weight.size for name, layers in some.items()}
    average = sum(sizes[name] * bits for name, bits in plan.bits.items()) / sum(sizes.values())
    assert AVERAGE - 0.2 < average <= AVERAGE
    worst = max(plan.mse, key=plan.mse.get)
    assert (plan.bits[worst], plan.prompts) == (
        8,
        sensitivity.calibration_prompts(components.vocabulary),
    )


def test_a_folder_keeps_its_palettes(components, plan, folder):
    assert palettes.load_palettes(folder) == plan
    network = load_pretrained(folder).transformer
    palettes.check_palettes(network, plan)
    # What has become too small for palettes in a narrow network is no reason to refuse it.
    for width in (0.5, 0.375):
        palettes.check_palettes(extract(network, width), plan)
    weight = network.down_blocks[0].ffn.linear1.weight
    weight[3, 5] = weight[3, 5] + 0.001
    with pytest.raises(UserError, match=r"down_blocks.0.ffn.linear1 does not hold the \d+ numbers"):
        palettes.check_palettes(network, plan)
    with pytest.raises(UserError, match="does not hold the 16 numbers"):
        other = dataclasses.replace(plan, bits=dict.fromkeys(plan.bits, 4))
        palettes.check_palettes(load_pretrained(folder).transformer, other)
    with pytest.raises(UserError, match=r"has no down_blocks\.0\.ffn\.linear1"):
        bits = {name: n for name, n in plan.bits.items() if name != "down_blocks.0.ffn.linear1"}
        palettes.check_palettes(network, dataclasses.replace(plan, bits=bits))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "has format version 2"),
        ({"layers": {"head.linear": {"bits": 5, "mse": 0.1}}}, "other than 4 and 8 bits"),
        ({"layers": []}, "cannot be read"),
    ],
)
def test_a_file_of_another_kind_is_refused(changed, message, folder, tmp_path):
    assert palettes.load_palettes(tmp_path) is None
    values = json.loads((folder / palettes.FILE).read_text())
    (tmp_path / palettes.FILE).write_text(json.dumps(values | changed))
    with pytest.raises(UserError, match=message):
        palettes.load_palettes(tmp_path)
