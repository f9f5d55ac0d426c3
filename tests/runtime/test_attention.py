"""ASSA and its parts against plain numpy written from the paper's formulas."""

import dataclasses
import gc
import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.networks import attention, layers
from mlx_snapgen.networks.attention import (
    CrossAttention,
    Grid,
    SelfAttention,
    SparseSelfAttention,
    apply_rope,
)
from mlx_snapgen.networks.layers import attend
from tests.tiny import TRANSFORMER, randomize

CONFIG = dataclasses.replace(
    TRANSFORMER,
    num_kv_heads=4,
    num_cross_kv_heads=2,
    text_width=24,
    num_bands=4,
    widths=(1.0, 0.5),
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def band_mask(grid, num_bands, radius):
    """(N, N), true where the band of the query may see the band of the key."""
    band = np.arange(grid.height) // math.ceil(grid.height / num_bands)
    band = np.repeat(band, grid.width)
    return np.abs(band[:, None] - band[None, :]) <= radius


def numpy_rope(x, rows, columns, theta):
    """Rotate one head's vectors (N, D): first half of the pairs by rows, rest by columns."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for pair in range(half):
        position = rows if pair < half // 2 else columns
        angle = position * theta ** -((pair % (half // 2)) / (half // 2))
        a, b = x[:, pair], x[:, pair + half]
        out[:, pair] = a * np.cos(angle) - b * np.sin(angle)
        out[:, pair + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def numpy_layer_norm(x, norm):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * np.array(norm.weight) + np.array(norm.bias)


def numpy_linear(x, layer):
    y = x @ np.array(layer.weight).T
    return y + np.array(layer.bias) if "bias" in layer else y


def numpy_assa(module, h, grid, config):
    """Equations 1-3 of the paper and the per-head mix for one picture h (N, d), in loops."""
    dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads
    q, k, v = (numpy_linear(h, getattr(module, f"{n}_proj")) for n in "qkv")
    q = numpy_layer_norm(q.reshape(-1, heads, dim), module.q_norm.members[0])
    k = numpy_layer_norm(k.reshape(-1, kv_heads, dim), module.k_norm.members[0])
    v = v.reshape(-1, kv_heads, dim)
    rows, columns = np.divmod(np.arange(grid.height * grid.width), grid.width)

    def convolve(x, layer):  # 2x2, stride 2, over all kv channels
        kernel = np.array(layer.weight).reshape(kv_heads * dim, 2, 2, kv_heads * dim)
        x = x.reshape(grid.height, grid.width, kv_heads * dim)
        cells = [
            sum(kernel[:, i, j] @ x[r + i, c + j] for i in (0, 1) for j in (0, 1))
            for r in range(0, grid.height, 2)
            for c in range(0, grid.width, 2)
        ]
        return np.stack(cells).reshape(-1, kv_heads, dim)

    k_cells, v_cells = convolve(k, module.k_compress), convolve(v, module.v_compress)
    cell_rows, cell_columns = np.divmod(np.arange(len(k_cells)), grid.width // 2)
    mask = band_mask(grid, config.num_bands, config.band_radius)
    mix = 1 / (1 + np.exp(-numpy_linear(h, module.mix_proj)))
    out = np.empty((len(h), heads, dim))
    for head in range(heads):
        kv = head // (heads // kv_heads)
        query = numpy_rope(q[:, head], rows, columns, config.rope_theta)
        near = numpy_rope(k[:, kv], rows, columns, config.rope_theta)
        far = numpy_rope(
            k_cells[:, kv], 2 * cell_rows + 0.5, 2 * cell_columns + 0.5, config.rope_theta
        )
        scores = np.where(mask, query @ near.T / math.sqrt(dim), -np.inf)
        out_local = softmax(scores) @ v[:, kv]
        out_global = softmax(query @ far.T / math.sqrt(dim)) @ v_cells[:, kv]
        weight = mix[:, head, None]
        out[:, head] = weight * out_global + (1 - weight) * out_local
    return numpy_linear(out.reshape(len(h), -1), module.out_proj)


@pytest.mark.parametrize("grid", [Grid(8, 8), Grid(6, 4), Grid(10, 2), Grid(2, 6), Grid(14, 4)])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_assa_matches_the_formulas(grid, radius):
    config = dataclasses.replace(CONFIG, band_radius=radius)
    module = randomize(SparseSelfAttention(config), 0)
    h = np.random.default_rng(0).normal(size=(2, grid.height * grid.width, 64))
    out = np.array(module(mx.array(h, mx.float32), grid))
    for i in range(2):
        np.testing.assert_allclose(out[i], numpy_assa(module, h[i], grid, config), atol=2e-4)


@pytest.mark.parametrize("form", ["bands_looped", "bands_batched"])
@pytest.mark.parametrize(
    ("height", "num_bands"), [(16, 16), (16, 4), (10, 4), (6, 16), (2, 4), (18, 5), (64, 16)]
)
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_bna_equals_dense_attention_under_the_band_mask(form, height, num_bands, radius):
    grid = Grid(height, 6)
    n = grid.height * grid.width
    mx.random.seed(1)
    q, k, v = (mx.random.normal((2, heads, n, 8)) for heads in (4, 2, 2))
    band = math.ceil(height / num_bands) * grid.width
    out = getattr(attention, form)(q, k, v, band=band, radius=radius)
    dense = attend(q, k, v, mask=mx.array(band_mask(grid, num_bands, radius)))
    np.testing.assert_allclose(np.array(out), np.array(dense), atol=1e-5)


def test_bna_forms_have_the_same_gradients():
    mx.random.seed(2)
    qkv = [mx.random.normal((1, 2, 96, 8)) for _ in range(3)]

    def loss(form):
        return lambda q, k, v: getattr(attention, form)(q, k, v, band=12, radius=1).square().sum()

    pairs = zip(
        mx.grad(loss("bands_looped"), argnums=(0, 1, 2))(*qkv),
        mx.grad(loss("bands_batched"), argnums=(0, 1, 2))(*qkv),
        strict=True,
    )
    for looped, batched in pairs:
        np.testing.assert_allclose(np.array(looped), np.array(batched), atol=1e-5)


def peak_of(run):
    """Most memory in bytes that `run` takes beside what exists, and its evaluated result."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = run()
    mx.eval(result)
    return mx.get_peak_memory() - before, result


def gradients(attention, *arrays):
    def loss(*arrays):
        return attention(*arrays).astype(mx.float32).square().sum()

    return mx.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)


def heads_of(*shapes, dtype=mx.float32, head_dim=8):
    keys = mx.random.split(mx.random.key(3), len(shapes))
    return [
        mx.random.normal((*s, head_dim), key=k).astype(dtype)
        for s, k in zip(shapes, keys, strict=True)
    ]


def difference(found, expected):
    """The largest difference, relative to the largest value of each array."""
    return max(
        float((mx.abs(a - b).max() / mx.abs(b).max()).item())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_mask_and_a_modulation_count_together(dtype):
    arrays = heads_of((2, 4, 6), (2, 2, 9), (2, 2, 9), dtype=dtype)
    mask = (mx.arange(9)[None] < mx.array([[9], [5]]))[:, None, None]
    modulation = mx.random.uniform(shape=(6, 9), key=mx.random.key(0))
    found = attend(*arrays, mask=mask, modulation=modulation)
    assert found.dtype == dtype
    q, k, v = (np.array(x.astype(mx.float32)) for x in arrays)
    k, v = k.repeat(2, axis=1), v.repeat(2, axis=1)
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / math.sqrt(8), -np.inf)
    expected = (softmax(scores) * np.array(modulation)) @ v
    atol = 1e-5 if dtype == mx.float32 else 0.02
    np.testing.assert_allclose(np.array(found.astype(mx.float32)), expected, atol=atol)


@pytest.mark.parametrize("masked", [None, "mask", "modulation"])
@pytest.mark.parametrize(("kv_heads", "queries", "keys"), [(4, 200, 200), (2, 320, 77), (1, 64, 9)])
def test_scores_in_parts_have_the_same_gradients(monkeypatch, masked, kv_heads, queries, keys):
    monkeypatch.setattr(attention, "MANY_SCORES", 0)
    monkeypatch.setattr(attention, "PART_SCORES", 1)  # the fewest queries at a time: 64
    arrays = heads_of((2, 4, queries), (2, kv_heads, keys), (2, kv_heads, keys))
    settings = {}
    if masked == "mask":
        settings["mask"] = (mx.arange(keys)[None] < mx.array([[keys], [5]]))[:, None, None]
    if masked == "modulation":
        settings["modulation"] = mx.random.uniform(shape=(queries, keys), key=mx.random.key(0))

    def run(save_memory, *arrays):
        return attention.attend_all(*arrays, save_memory=save_memory, **settings)

    np.testing.assert_allclose(
        np.array(run(True, *arrays)), np.array(run(False, *arrays)), atol=1e-5
    )
    found, expected = (gradients(partial(run, save), *arrays) for save in (True, False))
    assert all(mx.any(g) for g in expected)
    assert difference(found, expected) < 1e-6
    # In bfloat16 they are as near to those of float32 as the plain ones, which sum in it.
    halves = [x.astype(mx.bfloat16) for x in arrays]
    exact = gradients(partial(run, False), *(x.astype(mx.float32) for x in halves))
    found, plain = (gradients(partial(run, save), *halves) for save in (True, False))
    assert {g.dtype for g in found} == {mx.bfloat16}
    assert difference(found, exact) < 1.2 * difference(plain, exact) < 0.2


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("height", "num_bands", "radius"), [(8, 4, 1), (9, 4, 1), (8, 4, 2)])
def test_bands_in_parts_have_the_same_gradients(monkeypatch, height, num_bands, radius, modulated):
    monkeypatch.setattr(attention, "MANY_SCORES", 0)
    grid = Grid(height, 6)
    arrays = heads_of((2, 4, height * 6), (2, 2, height * 6), (2, 2, height * 6))
    modulation = attention.modulation_matrix(grid, grid) if modulated else None

    def run(save_memory, *arrays):
        return attention.neighborhood_attention(
            *arrays,
            grid=grid,
            num_bands=num_bands,
            radius=radius,
            modulation=modulation,
            save_memory=save_memory,
        )

    np.testing.assert_allclose(
        np.array(run(True, *arrays)), np.array(run(False, *arrays)), atol=1e-6
    )
    found, expected = (gradients(partial(run, save), *arrays) for save in (True, False))
    assert difference(found, expected) < 1e-6


@pytest.mark.parametrize("form", ["dense", "bands"])
def test_scores_in_parts_never_exist_at_once(form):
    """About 20 MiB of scores in float32, and parts of 1 MiB."""
    grid = Grid(48, 32) if form == "dense" else Grid(64, 64)
    n = grid.height * grid.width
    arrays = heads_of((1, 2, n), (1, 1, n), (1, 1, n))
    mx.eval(arrays)

    def run(save_memory, *arrays):
        if form == "dense":
            return attention.attend_all(*arrays, save_memory=save_memory)
        return attention.neighborhood_attention(
            *arrays, grid=grid, num_bands=16, radius=1, save_memory=save_memory
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MANY_SCORES", 2**22)
        patch.setattr(attention, "PART_SCORES", 2**18)
        lean, found = peak_of(lambda: gradients(partial(run, True), *arrays))
        plain, expected = peak_of(lambda: gradients(partial(run, False), *arrays))
        forward = [peak_of(lambda save=save: run(save, *arrays))[0] for save in (True, False)]
    assert difference(found, expected) < 1e-6
    assert lean < 0.35 * plain, (lean / 2**20, plain / 2**20)
    # The bands of the CPU are parts in any case.
    assert form == "bands" or forward[0] < 0.5 * forward[1], forward


def test_rope_scores_depend_on_relative_position_only():
    grid = Grid(6, 8)
    mx.random.seed(3)
    q, k = (mx.broadcast_to(mx.random.normal((8,)), (1, 1, 48, 8)) for _ in range(2))
    scores = np.array(
        apply_rope(q, grid, theta=100.0)[0, 0] @ apply_rope(k, grid, theta=100.0)[0, 0].T
    ).reshape(6, 8, 6, 8)
    np.testing.assert_allclose(scores[1, 2, 4, 5], scores[0, 1, 3, 4], atol=1e-5)
    assert abs(scores[1, 2, 4, 5] - scores[1, 2, 5, 5]) > 1e-3
    assert abs(scores[1, 2, 4, 5] - scores[1, 2, 4, 6]) > 1e-3


def test_grouped_queries_share_keys_in_order():
    config = dataclasses.replace(CONFIG, sparse_attention=False)
    module = randomize(SelfAttention(config), 0)
    wide = randomize(SelfAttention(dataclasses.replace(config, num_kv_heads=8)), 5)
    for name in ("q_proj", "out_proj", "q_norm", "k_norm"):
        getattr(wide, name).update(getattr(module, name).parameters())
    for name in ("k_proj", "v_proj"):  # each of 4 kv heads, twice
        for key, p in getattr(module, name).parameters().items():
            p = mx.repeat(p.reshape(4, 8, *p.shape[1:]), 2, axis=0)
            getattr(wide, name)[key] = p.reshape(64, *p.shape[2:])
    h = mx.random.normal((2, 16, 64))
    np.testing.assert_allclose(
        np.array(module(h, Grid(4, 4))), np.array(wide(h, Grid(4, 4))), atol=1e-5
    )


def test_cross_attention_matches_numpy_and_ignores_masked_tokens():
    module = randomize(CrossAttention(CONFIG), 0)
    rng = np.random.default_rng(0)
    h, text = rng.normal(size=(2, 5, 64)), rng.normal(size=(2, 7, 24))
    mask = np.arange(7)[None] < np.array([[4], [7]])
    out = module(mx.array(h, mx.float32), mx.array(text, mx.float32), mask=mx.array(mask))
    out = np.array(out)
    for i in range(2):
        seen = text[i][mask[i]]
        q = numpy_linear(h[i], module.q_proj).reshape(5, 8, 8)
        k = numpy_linear(seen, module.k_proj).reshape(-1, 2, 8)
        v = numpy_linear(seen, module.v_proj).reshape(-1, 2, 8)
        heads = [softmax(q[:, n] @ k[:, n % 2].T / math.sqrt(8)) @ v[:, n % 2] for n in range(8)]
        expected = numpy_linear(np.stack(heads, 1).reshape(5, 64), module.out_proj)
        np.testing.assert_allclose(out[i], expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_without_text_cross_attention_is_exactly_zero(dtype):
    module = randomize(CrossAttention(CONFIG), 0)
    module.set_dtype(dtype)
    keys = mx.random.split(mx.random.key(0), 2)
    h = mx.random.normal((3, 5, 64), key=keys[0]).astype(dtype)
    text = mx.random.normal((3, 7, 24), key=keys[1]).astype(dtype)
    mask = mx.arange(7)[None] < mx.array([[4], [0], [7]])
    out = module(h, text, mask=mask)
    assert not mx.any(out[1])
    # The other rows do not change, in any bit.
    full = module(h, text, mask=mask | (mx.arange(3) == 1)[:, None])
    assert mx.array_equal(out[::2], full[::2]) and mx.all(mx.abs(full).sum(axis=(1, 2)) > 1)

    def loss(h, text, weights):
        module.update(weights)
        return module(h, text, mask=mask).square().sum()

    weights = module.parameters()
    grads = mx.grad(loss, argnums=(0, 1, 2))(h, text, weights)
    module.update(weights)
    assert all(mx.isfinite(g).all() for _, g in tree_flatten(grads))
    assert not mx.any(grads[0][1]) and not mx.any(grads[1][1]) and mx.any(grads[1][0])


def test_attention_modulation_follows_edt():
    n = 4
    matrix = np.array(attention.modulation_matrix(Grid(n, n), Grid(n, n))).reshape(n, n, n, n)
    period = 4 * math.sqrt(2) * (n - 1)
    assert matrix[1, 1, 1, 1] == pytest.approx(0.5 * math.e)
    assert matrix[0, 0, 1, 2] == pytest.approx(
        0.5 * math.exp(math.cos(2 * math.pi * math.sqrt(5) / period))
    )
    assert matrix[0, 0, 3, 3] == 0 < matrix[0, 0, 3, 2], "sqrt(18) is beyond sqrt(13), sqrt(13) not"
    cells = np.array(attention.modulation_matrix(Grid(n, n), Grid(2, 2, 2)))
    distance = math.hypot(0.5, 2.5)  # token (0, 0) to the centre of cell (0, 1), at (.5, 2.5)
    assert cells[0, 1] == pytest.approx(0.5 * math.exp(math.cos(2 * math.pi * distance / period)))


def test_modulated_assa_weighs_attention_after_the_softmax():
    grid = Grid(8, 4)
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, heads, 32, 8)) for heads in (4, 2, 2))
    matrix = attention.modulation_matrix(grid, grid)
    out = attention.neighborhood_attention(
        q, k, v, grid=grid, num_bands=4, radius=1, modulation=matrix
    )
    mask = band_mask(grid, 4, 1)
    for head in range(4):
        scores = np.array(q[0, head] @ k[0, head // 2].T) / math.sqrt(8)
        weights = softmax(np.where(mask, scores, -np.inf)) * np.array(matrix)
        expected = weights @ np.array(v[0, head // 2])
        np.testing.assert_allclose(np.array(out[0, head]), expected, atol=1e-5)
    module = randomize(SparseSelfAttention(CONFIG), 0)
    h = mx.random.normal((1, 32, 64))
    change = mx.abs(module(h, grid, modulate=True) - module(h, grid)).max().item()
    assert change > 1e-3


@pytest.mark.parametrize("rows", [None, 1, 37])
def test_many_scores_are_computed_in_parts(rows, monkeypatch):
    """The same numbers and gradients; keys are shared by heads, masks have one row or many."""
    q, k, v = (
        mx.random.normal((2, heads, n, 8), key=mx.random.key(i))
        for i, (heads, n) in enumerate([(4, 37), (2, 50), (2, 50)])
    )
    mask = None
    if rows is not None:
        mask = mx.random.uniform(shape=(2, 1, rows, 50), key=mx.random.key(3)) > 0.3

    def run(q, k, v):
        return attend(q, k, v, mask=mask).square().sum()

    expected = attend(q, k, v, mask=mask), *mx.grad(run, argnums=(0, 1, 2))(q, k, v)
    monkeypatch.setattr(layers, "PART_OF_SCORES", 16 * 2 * 4 * 50)
    found = attend(q, k, v, mask=mask), *mx.grad(run, argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(found, expected, strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_equal_splits_of_a_computed_array_compile():
    """As when a step computes a network twice: `mx.split` itself fails there (MLX 0.32.4)."""
    x = mx.random.normal((4, 8))

    def product(x):
        return layers.split(x * 2, 2, axis=0)[0].exp() @ layers.split(x * 2, 2, axis=0)[1].T

    assert mx.allclose(mx.compile(product)(x), product(x), atol=1e-5).item()
