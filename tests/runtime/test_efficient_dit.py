"""The Efficient DiT: shapes, sizes, stages, and the elastic slicing rule."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_snapgen.errors import UserError
from mlx_snapgen.networks.efficient_dit import EfficientDiT, count_parameters
from mlx_snapgen.networks.elastic import ElasticLinear, extract, narrowed, slice_groups
from mlx_snapgen.networks.text_encoders.base import TextStates
from mlx_snapgen.presets import TRANSFORMERS, preset_autoencoder
from mlx_snapgen.settings import WIDTH_NAMES, WIDTHS
from tests.tiny import TRANSFORMER, randomize

CONFIG = dataclasses.replace(
    TRANSFORMER, blocks=(1, 5, 2), num_bands=4, text_dims=(12, 20), text_width=16
)


@pytest.fixture(scope="module")
def network():
    return randomize(EfficientDiT(CONFIG), 0)


def inputs(height=8, width=12, batch=2, seed=1):
    mx.random.seed(seed)
    states = [
        TextStates(mx.random.normal((batch, n, d)), mx.arange(n)[None] < mx.array([[n], [n - 2]]))
        for n, d in ((5, 12), (4, 20))
    ]
    return mx.random.normal((batch, height, width, 4)), mx.array([0.2, 0.9]), states


def run(network, x_t, t, states, **kwargs):
    text, mask = network.encode_text(states)
    return network(x_t, t, text, mask, **kwargs)


def test_a_network_of_clean_latents_draws_what_it_predicts(network):
    """Same weights: what one gives as velocity is where one Euler step of the other ends."""
    x_t, t, states = inputs()
    t = mx.array([0.2, 0.03])
    of_x0 = EfficientDiT(dataclasses.replace(CONFIG, prediction="x0"))
    of_x0.update(network.parameters())
    x0 = np.array(run(network, x_t, t, states))
    v = run(of_x0, x_t, t, states)
    assert np.abs(x0).max() > 0.1
    np.testing.assert_allclose(np.array(x_t - 0.2 * v)[0], x0[0], atol=1e-5)
    # Below a noise level of 0.05, the distance is divided by 0.05.
    np.testing.assert_allclose(np.array(x_t - 0.05 * v)[1], x0[1], atol=1e-5)


def test_unknown_prediction():
    with pytest.raises(UserError, match="unknown prediction 'eps'"):
        dataclasses.replace(CONFIG, prediction="eps")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("width", CONFIG.widths)
def test_a_width_equals_its_extracted_network(network, width, dtype):
    x_t, t, states = inputs()
    network = randomize(EfficientDiT(CONFIG), 0)
    network.set_dtype(dtype)
    x_t = x_t.astype(dtype)
    states = [TextStates(s.astype(dtype), m) for s, m in states]
    alone = extract(network, width)
    inside = run(network, x_t, t, states, share=width).astype(mx.float32)
    outside = run(alone, x_t, t, states).astype(mx.float32)
    assert alone.config == CONFIG.standalone(width)
    assert float(mx.abs(inside).max()) > 0.1
    np.testing.assert_allclose(np.array(inside), np.array(outside), atol=1e-5)


def test_widths_differ_and_share_what_the_rule_says(network):
    x_t, t, states = inputs()
    full, small, tiny = (run(network, x_t, t, states, share=w) for w in CONFIG.widths)
    assert float(mx.abs(full - small).max()) > 1e-2
    assert float(mx.abs(small - tiny).max()) > 1e-2

    def loss(params, width):
        network.update(params)
        return run(network, x_t, t, states, share=width).square().sum()

    params = network.trainable_parameters()
    grads = dict(tree_flatten(mx.grad(loss)(params, 0.5)))
    network.update(params)
    q = grads["down_blocks.0.self_attention.q_proj.weight"]
    assert float(mx.abs(q[:32, :32]).min()) > 0
    assert float(mx.abs(q[32:]).max()) == 0 == float(mx.abs(q[:, 32:]).max())
    cross = grads["down_blocks.0.cross_attention.k_proj.weight"]
    assert float(mx.abs(cross).min()) > 0, "cross-attention keys are never sliced"
    own = [float(mx.abs(grads[f"time.members.{i}.linear.weight"]).max()) for i in range(3)]
    assert own[0] == 0 and own[1] > 0 and own[2] == 0, "modulation is separate per width"


def test_slice_rule_keeps_the_head_of_every_group():
    x = mx.arange(24).reshape(8, 3)
    kept = slice_groups(x, 0, groups=4, share=0.5)
    np.testing.assert_array_equal(np.array(kept), np.array(x)[[0, 2, 4, 6]])
    layer = ElasticLinear(16, 8, in_groups=4)
    cut = layer.sliced(0.5)["weight"]
    columns = [0, 1, 4, 5, 8, 9, 12, 13]
    np.testing.assert_array_equal(np.array(cut), np.array(layer.weight)[:4, columns])


@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("sliced", [(True, True), (True, False), (False, True)])
def test_a_part_is_added_where_its_slice_is(groups, sliced):
    how = {"slice_in": sliced[0], "slice_out": sliced[1]}
    layer = ElasticLinear(16, 8, in_groups=groups[0], out_groups=groups[1], **how)
    for whole, name in ((mx.arange(128.0).reshape(8, 16), "weight"), (mx.arange(8.0), "bias")):
        part = 1000 + layer.sliced(0.5)[name]
        layer[name] = whole
        _, [slope] = mx.vjp(lambda w, n=name: layer.update({n: w}).sliced(0.5)[n], [whole], [part])
        layer[name] = whole
        np.testing.assert_array_equal(layer.add_to_slice(whole, part, 0.5), whole + slope)


@pytest.mark.parametrize("width", CONFIG.widths[1:])
def test_a_narrowed_network_is_the_sub_network_and_whole_again_after(network, width):
    x_t, t, states = inputs()
    before = dict(tree_flatten(network.parameters()))
    expected = run(network, x_t, t, states, share=width)
    with narrowed(network, width) as layers:
        found = run(network, x_t, t, states, share=width)
        np.testing.assert_allclose(found, expected, atol=2e-5)
        sizes = {name: value.shape for name, value in tree_flatten(network.parameters())}
        with pytest.raises(ValueError, match="other"):
            run(network, x_t, t, states, share=1.0)
    alone = {f"{path}.{k}" for path, layer in layers.items() for k in layer.sliced(width)}
    smaller = {name for name in before if sizes[name] != before[name].shape}
    assert smaller and smaller <= alone
    after = dict(tree_flatten(network.parameters()))
    assert all(after[name] is before[name] for name in before)


def test_quantized_layer_equals_its_dequantized_weights_and_refuses_a_width():
    mx.random.seed(0)
    layer = ElasticLinear(64, 32)
    layer.bias = mx.random.normal((32,))
    quantized = layer.to_quantized(group_size=32, bits=8)
    x = mx.random.normal((3, 64))
    weight = mx.dequantize(
        quantized.weight, quantized.scales, quantized.biases, group_size=32, bits=8
    )
    expected = x @ weight.T + layer.bias
    np.testing.assert_allclose(np.array(quantized(x)), np.array(expected), atol=1e-4)
    assert float(mx.abs(weight - layer.weight).max()) < 2e-3
    with pytest.raises(ValueError, match="one width"):
        quantized(x, 0.5)
    assert isinstance(quantized, nn.QuantizedLinear)


def test_published_sizes():
    """The paper's 1.6B and 0.4B hold within 7%.

    Its 0.3B cannot hold beside them within 7% at 0.375x: what shrinks with the width is quadratic
    in it, so N(.5) - N(.375) = .1458 (N(1) - N(.5)), at least .1546B when full and small are within
    7%, while .428B - .279B = .149B. Ours rounds to 0.3B.
    """
    counts = {name: count_parameters(TRANSFORMERS[name]) for name in WIDTH_NAMES}
    assert counts["full"] == pytest.approx(1.6e9, rel=0.07)
    assert counts["small"] == pytest.approx(0.4e9, rel=0.07)
    assert round(counts["tiny"] / 1e9, 1) == 0.3
    for name, width in ((width.name, width.share) for width in WIDTHS):
        assert TRANSFORMERS["supernetwork"].standalone(width) == TRANSFORMERS[name]


@pytest.mark.parametrize("name", ["supernetwork", "full", "small", "tiny"])
def test_presets_for_dc_ae_have_a_quarter_of_the_tokens(name):
    few, many = TRANSFORMERS[f"{name}-f32"], TRANSFORMERS[name]
    factor = preset_autoencoder(f"{name}-f32").downsampling
    assert few.latent_channels == preset_autoencoder(f"{name}-f32").latent_channels
    assert 4 * (1024 // factor // few.patch_size) ** 2 == (1024 // 8 // many.patch_size) ** 2
    assert abs(count_parameters(few) / count_parameters(many) - 1) < 1e-3
    # Bands of four rows at 1024 pixels.
    assert 1024 // factor // few.num_bands == 1024 // 16 // many.num_bands == 4


def test_ladder_is_the_papers():
    a, b, c, d = (TRANSFORMERS[f"ladder-{x}"] for x in "abcd")
    assert a.blocks == (28, 0, 0) and a.num_kv_heads == 1 and not a.sparse_attention
    assert b.blocks == (6, 14, 8) and not b.sparse_attention and not b.long_skips
    assert c == dataclasses.replace(b, sparse_attention=True)
    assert d == TRANSFORMERS["small"] and d.long_skips and d.blocks == (8, 10, 10)


@pytest.mark.parametrize("name", ["ladder-a", "ladder-b", "ladder-c", "ladder-d"])
def test_every_rung_runs(name):
    config = dataclasses.replace(
        TRANSFORMERS[name],
        hidden_size=64,
        head_dim=8,
        blocks=tuple(min(n, 2) for n in TRANSFORMERS[name].blocks),
        latent_channels=4,
        text_dims=(12, 20),
        text_width=16,
    )
    out = run(randomize(EfficientDiT(config), 0), *inputs())
    assert out.shape == (2, 8, 12, 4) and bool(mx.isfinite(out).all())


@pytest.mark.parametrize("size", [(4, 4), (4, 20), (12, 8), (24, 4)])
def test_any_even_grid_runs(network, size):
    x_t, t, states = inputs(*size)
    v, features = run(network, x_t, t, states, return_features=True)
    assert v.shape == x_t.shape
    assert features.shape == (2, size[0] * size[1] // 4, 64)


def test_odd_grid_names_the_way_out(network):
    with pytest.raises(UserError, match="latents of 6x8 do not divide by 4"):
        run(network, *inputs(6, 8))
    with pytest.raises(UserError, match="holds the widths 1, "):
        run(network, *inputs(), share=0.25)


def test_padding_and_dropped_encoders_do_not_matter(network):
    x_t, t, states = inputs()
    expected = run(network, x_t, t, states)
    noisy = [TextStates(mx.where(m[..., None], s, 100.0), m) for s, m in states]
    np.testing.assert_allclose(np.array(run(network, x_t, t, noisy)), np.array(expected), atol=1e-5)
    first, (s, m) = states
    dropped = [first, TextStates(s, mx.zeros_like(m))]
    garbage = [first, TextStates(s * 50, mx.zeros_like(m))]
    without = run(network, x_t, t, dropped)
    np.testing.assert_allclose(
        np.array(without), np.array(run(network, x_t, t, garbage)), atol=1e-5
    )
    assert float(mx.abs(without - expected).max()) > 1e-3


@pytest.mark.parametrize("states_are", [100.0, float("nan")])
def test_absent_text_adds_nothing_however_it_is_absent(network, states_are):
    x_t, t, [first, second] = inputs()
    masked = [TextStates(s, mx.zeros_like(m)) for s, m in (first, second)]
    expected = run(network, x_t, t, masked)
    filled = [TextStates(mx.full(s.shape, states_are), m) for s, m in masked]
    for states in ([masked[0], None], [None, masked[1]], filled):
        np.testing.assert_array_equal(np.array(run(network, x_t, t, states)), np.array(expected))
    # One picture of a batch without text, the other as before.
    keep = mx.array([[True], [False]])
    half = [TextStates(s, m & keep) for s, m in (first, second)]
    mixed, both = run(network, x_t, t, half), run(network, x_t, t, [first, second])
    np.testing.assert_array_equal(np.array(mixed[0]), np.array(both[0]))
    np.testing.assert_allclose(np.array(mixed[1]), np.array(expected[1]), atol=1e-5)
    assert float(mx.abs(both[1] - expected[1]).max()) > 1e-3


def test_a_fresh_network_predicts_zero_and_learns_from_the_first_step():
    network = EfficientDiT(CONFIG)
    x_t, t, states = inputs()
    assert float(mx.abs(run(network, x_t, t, states)).max()) == 0

    def loss(params):
        network.update(params)
        return (run(network, x_t, t, states) - 1).square().mean()

    grads = dict(tree_flatten(mx.grad(loss)(network.trainable_parameters())))
    assert float(mx.abs(grads["head.linear.weight"]).max()) > 0


def test_long_skips_and_stage_skip_carry_signal():
    x_t, t, states = inputs()
    network = randomize(EfficientDiT(CONFIG), 0)
    before = run(network, x_t, t, states)
    for i, skip in enumerate(network.long_skips):
        kept = skip.linear.weight
        skip.linear.weight = mx.concatenate([kept[:, :64], mx.zeros((64, 64))], axis=1)
        assert float(mx.abs(run(network, x_t, t, states) - before).max()) > 1e-3, i
        skip.linear.weight = kept
    network.upsample.skip_weight = mx.array([1.0])
    assert float(mx.abs(run(network, x_t, t, states) - before).max()) > 1e-3


def test_attention_modulation_touches_every_second_up_block():
    x_t, t, states = inputs()
    one = randomize(EfficientDiT(dataclasses.replace(CONFIG, blocks=(2, 2, 1))), 0)
    two = randomize(EfficientDiT(dataclasses.replace(CONFIG, blocks=(2, 2, 2))), 0)
    for network, changes in ((one, False), (two, True)):
        plain = run(network, x_t, t, states)
        modulated = run(network, x_t, t, states, modulate_attention=True)
        assert (float(mx.abs(plain - modulated).max()) > 1e-4) == changes


def test_masked_tokens_do_not_reach_the_middle_stage(network):
    """A masked token's content still arrives by the Down -> Up skip, but the Middle stage and so
    the other tokens' keys from it do not see it: with the skip closed the output ignores it."""
    x_t, t, states = inputs()
    network = randomize(EfficientDiT(dataclasses.replace(CONFIG, blocks=(1, 5, 1))), 0)
    everything = run(network, x_t, t, states)
    keep = mx.ones((2, 24), mx.bool_)
    np.testing.assert_allclose(
        np.array(run(network, x_t, t, states, keep=keep)), np.array(everything), atol=1e-6
    )
    masked = run(network, x_t, t, states, keep=mx.arange(24)[None] > mx.array([[10], [0]]))
    assert float(mx.abs(masked - everything).max()) > 1e-3
    network.upsample.skip_weight = mx.array([1.0])
    nothing = mx.zeros((2, 24), mx.bool_)
    np.testing.assert_allclose(
        np.array(run(network, x_t, t, states, keep=nothing)),
        np.array(run(network, 3 * x_t, t, states, keep=nothing)),
        atol=1e-6,
    )
