"""Palettes: k-means, the sensitivity of layers, and which of them get more bits."""

import numpy as np
import pytest

from mlx_snapgen.errors import UserError

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
from convert import palettes  # noqa: E402


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
    weight = torch.randn(64, 256, 2, 2)
    for bits in (4, 8):
        found = palettes.palettized(weight, bits)
        assert found.unique().numel() <= 2**bits
        assert torch.equal(found, found.half().float())
        # Panter and Dite: 2.72 / 2^(2 bits) for a normal distribution.
        assert (found - weight).square().mean() < 1.2 * 2.72 / 4**bits


def test_a_layer_s_error_is_that_of_its_own_output(monkeypatch):
    monkeypatch.setattr(palettes, "LEAST", 64)
    torch.manual_seed(0)
    first, second, unused = (torch.nn.Conv2d(8, 8, 1) for _ in range(3))
    network = torch.nn.Sequential(first, second).requires_grad_(False)
    network.unused = unused
    x = torch.randn(1, 8, 4, 4)
    found = palettes.sensitivities(network, lambda: [first(x), second(3 * x)])
    assert found.keys() == {"0", "1"}
    changed = torch.nn.functional.conv2d(3 * x, palettes.palettized(second.weight, 4), second.bias)
    expected = (changed - second(3 * x)).square().mean().item()
    np.testing.assert_allclose(found["1"], expected, rtol=1e-4)


def test_the_worst_layers_get_more_bits():
    errors = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.0}
    sizes = {"a": 100, "b": 100, "c": 500, "d": 100}
    assert palettes.choose_bits(errors, sizes, 4.0) == dict.fromkeys("abcd", 4)
    assert palettes.choose_bits(errors, sizes, 8.0) == dict.fromkeys("abcd", 8)
    # c is too large for what b leaves.
    assert palettes.choose_bits(errors, sizes, 5.0) == {"a": 4, "b": 8, "c": 4, "d": 8}
    with pytest.raises(UserError, match="4 to 8 bits"):
        palettes.choose_bits(errors, sizes, 3.0)


def test_prompts_are_of_the_model_s_vocabulary():
    words = {"nouns": ["apple", "car"], "colours": ["red", "blue"]}
    assert palettes.calibration_prompts(words) == [
        "a red apple",
        "a blue apple",
        "a red car",
        "a blue car",
    ]
    assert palettes.calibration_prompts(None) == list(palettes.PROMPTS)
