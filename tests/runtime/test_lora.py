"""LoRA: numbers at every width, switching, fusing, the file format, and the way into pictures."""

import json
import os
import warnings
from pathlib import Path

import mlx_snapgen  # noqa: F401

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_snapgen.checkpoint.model import load_pretrained, save_pretrained
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.generate import main
from mlx_snapgen.lora.adapters import (
    Adapter,
    LoRALinear,
    adapted_layers,
    add_lora,
    fuse_lora,
    get_lora_weights,
    lora_weights,
    remove_lora,
    set_lora_weights,
    train_only,
)
from mlx_snapgen.lora.files import load_lora, save_lora
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.networks.efficient_dit import EfficientDiT
from mlx_snapgen.networks.elastic import ElasticLinear, extract, sliced_parameters
from mlx_snapgen.networks.layers import flat_parameters
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.public.convert import convert
from mlx_snapgen.public.source import find_source
from mlx_snapgen.quantize.runtime import quantize_transformer
from tests.tiny import add_random_lora, velocity

WIDTHS = (1.0, 0.5, 0.375)
QUERY = "down_blocks.0.self_attention.q_proj"


@pytest.fixture
def network(components):
    """The shared model's transformer: its arrays, in modules that a test may change."""
    network = EfficientDiT(components.config.transformer)
    network.update(components.transformer.parameters())
    return network


def differ(a, b):
    return mx.abs(a - b).max().item()


class Layers(nn.Module):
    """One layer of each kind of slicing."""

    def __init__(self):
        super().__init__()
        self.both = ElasticLinear(8, 16)
        self.merge = ElasticLinear(16, 8, bias=False, in_groups=4)
        self.split = ElasticLinear(8, 16, out_groups=4)
        self.enter = ElasticLinear(8, 16, slice_in=False)
        self.leave = ElasticLinear(16, 8, slice_out=False)
        self.plain = nn.Linear(8, 16)


KEPT = {  # rows, columns at width 1/2
    "both": (range(8), range(4)),
    "merge": (range(4), [0, 1, 4, 5, 8, 9, 12, 13]),
    "split": ([0, 1, 4, 5, 8, 9, 12, 13], range(4)),
    "enter": (range(8), range(8)),
    "leave": (range(8), range(8)),
    "plain": (range(16), range(8)),
}


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("name", KEPT)
def test_the_formula_in_numpy(name, width):
    layers = Layers()
    add_random_lora(layers, "one", rank=3, alpha=6.0, seed=1)
    add_random_lora(layers, "two", rank=5, alpha=1.0, seed=2)
    set_lora_weights(layers, {"one": 0.5, "two": -2})
    layer = layers[name]
    weight = np.array(layer.linear.weight)
    rows, columns = KEPT[name] if width != 1 else map(range, weight.shape)
    x = np.random.default_rng(0).normal(size=(2, 7, len(list(columns)))).astype(np.float32)
    expected = x @ weight[np.ix_(rows, columns)].T
    if "bias" in layer.linear:
        expected = expected + np.array(layer.linear.bias)[rows]
    for adapter, scale in (("one", 0.5 * 6 / 3), ("two", -2 * 1 / 5)):
        a = np.array(layer.adapters[adapter].a)[:, columns]
        b = np.array(layer.adapters[adapter].b)[rows]
        update = scale * (x @ a.T) @ b.T
        assert np.abs(update).max() > 0.01
        expected = expected + update
    found = layer(mx.array(x)) if name == "plain" else layer(mx.array(x), width)
    np.testing.assert_allclose(np.array(found), expected, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_new_adapter_changes_nothing(network, width):
    before = velocity(network, width)
    linear = [p for p, m in network.named_modules() if isinstance(m, (ElasticLinear, nn.Linear))]
    assert add_lora(network, 4, alpha=8, targets=["*"]) == sorted(linear)
    assert mx.array_equal(before, velocity(network, width))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_with_adapters_equals_its_extracted_network(network, width):
    base = velocity(network, width)
    add_random_lora(network, "one", seed=1)
    add_random_lora(network, "two", targets=["*_proj", "time.members.1.linear"], rank=2, seed=2)
    set_lora_weights(network, {"one": 0.7})
    inside = velocity(network, width)
    alone = extract(network, width)
    assert differ(inside, base) > 0.1
    assert differ(inside, velocity(alone)) < 1e-5
    assert get_lora_weights(alone) == {"one": 0.7, "two": 1.0}
    sliced = dict(tree_flatten(sliced_parameters(network, width)))
    assert {k: v.shape for k, v in sliced.items()} == {
        k: v.shape for k, v in flat_parameters(alone).items()
    }
    set_lora_weights(alone, {"one": 0, "two": 0})
    assert differ(base, velocity(alone)) < 1e-5
    assert get_lora_weights(network) == {"one": 0.7, "two": 1.0}


def test_fused_equals_unfused_at_every_width(network):
    keys = list(flat_parameters(network))
    add_random_lora(network, "one", seed=1)
    add_random_lora(network, "two", targets=["*ffn*"], seed=2)
    add_random_lora(network, "off", targets=["*_proj"], seed=3)
    set_lora_weights(network, {"two": -0.5, "off": 0})
    before = [velocity(network, width) for width in WIDTHS]
    assert fuse_lora(network) == ["one", "two"]
    assert get_lora_weights(network) == {"off": 0}
    for width, unfused in zip(WIDTHS, before, strict=True):
        assert differ(velocity(network, width), unfused) < 1e-5
        assert differ(velocity(extract(network, width)), unfused) < 1e-5
    remove_lora(network)
    assert list(flat_parameters(network)) == keys
    assert differ(velocity(network), before[0]) < 1e-5


def test_adapters_add_up():
    layers = Layers()
    x = mx.random.normal((3, 8))
    base = layers.both(x)
    add_random_lora(layers, "one", seed=1)
    one = layers.both(x) - base
    set_lora_weights(layers, {"one": 0})
    add_random_lora(layers, "two", seed=2)
    two = layers.both(x) - base
    set_lora_weights(layers, {"one": 0.25, "two": -3})
    assert mx.allclose(layers.both(x) - base, 0.25 * one - 3 * two, atol=1e-5)


def test_half_precision_stays_half_precision(network):
    network.set_dtype(mx.bfloat16)
    add_random_lora(network)
    layer = dict(network.named_modules())[QUERY]
    assert layer.adapters["style"].a.dtype == mx.float32
    assert layer(mx.ones((1, 2, 64), mx.bfloat16)).dtype == mx.bfloat16
    fuse_lora(network)
    assert {p.dtype for p in flat_parameters(network).values()} == {mx.bfloat16}


def test_quantized_bases(network):
    alone = extract(network, 0.5)
    add_random_lora(alone, targets=["ffn.linear?", "head.linear"])
    exact = velocity(alone)
    nn.quantize(alone, 32, 8, class_predicate=lambda p, m: p.endswith("ffn.linear1.linear"))
    quantized = dict(alone.named_modules())["up_blocks.0.ffn.linear1"]
    assert isinstance(quantized.linear, nn.QuantizedLinear)
    assert 0 < differ(velocity(alone), exact) < 0.1 * mx.abs(exact).max().item()
    before = flat_parameters(alone)
    with pytest.raises(UserError, match="is quantized: fuse the LoRA first"):
        fuse_lora(alone)
    assert list(flat_parameters(alone)) == list(before)
    add_random_lora(alone, "late", targets=["ffn.linear1"])
    assert quantized.adapters["late"].a.shape == (4, 32)
    dense = extract(network, 0.5)
    add_random_lora(dense)
    unrounded = velocity(dense)
    quantize_transformer(dense, 8)
    assert 0 < differ(velocity(dense), unrounded) < 0.1 * mx.abs(unrounded).max().item()


# --- switching ----------------------------------------------------------------------------------


def test_weight_zero_is_the_base_bit_for_bit_and_copies_nothing(network):
    base = [velocity(network, width) for width in WIDTHS]
    arrays = {id(p) for p in flat_parameters(network).values()}
    add_random_lora(network)
    assert arrays <= {id(p) for p in flat_parameters(network).values()}
    adapted = velocity(network)
    with lora_weights(network, {"style": 0}):
        for width, expected in zip(WIDTHS, base, strict=True):
            assert mx.array_equal(velocity(network, width), expected)
        assert arrays <= {id(p) for p in flat_parameters(network).values()}
    assert mx.array_equal(velocity(network), adapted)
    with pytest.raises(RuntimeError), lora_weights(network, {"style": 0.5}):
        raise RuntimeError
    assert get_lora_weights(network) == {"style": 1.0}
    remove_lora(network)
    assert mx.array_equal(velocity(network), base[0])
    assert not any(isinstance(m, LoRALinear) for m in network.modules())


def test_switching_inside_a_compiled_function():
    layers = Layers()
    add_random_lora(layers)
    x = mx.random.normal((3, 8))
    plain = {}
    for weight in (0, 1):
        set_lora_weights(layers, {"style": weight})
        plain[weight] = layers.both(x)
    assert differ(plain[0], plain[1]) > 0.1

    def both():
        """Teacher and few-step teacher, out of one set of weights."""
        with lora_weights(layers, {"style": 0}):
            teacher = layers.both(x)
        return teacher, layers.both(x)

    teacher, few_step = mx.compile(both, inputs=layers.state)()
    assert differ(teacher, plain[0]) < 1e-5
    assert differ(few_step, plain[1]) < 1e-5

    def at(weight):
        with lora_weights(layers, {"style": weight}):
            return layers.both(x)

    compiled = mx.compile(at, inputs=layers.state)
    for weight in (0, 1, 0):
        assert differ(compiled(weight), plain[weight]) < 1e-5


def test_gradients_through_checkpoints_see_the_weights_around_them():
    layers = Layers()
    add_random_lora(layers)
    checkpointed = nn.utils.checkpoint(layers.both)
    x = mx.random.normal((3, 8))
    with lora_weights(layers, {"style": 0}):
        expected = mx.grad(lambda x: layers.both(x).square().sum())(x)
        assert differ(mx.grad(lambda x: checkpointed(x).square().sum())(x), expected) < 1e-5
    assert differ(mx.grad(lambda x: layers.both(x).square().sum())(x), expected) > 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"stile": 1}, "no LoRA 'stile' .did you mean 'style'"), ({"style": float("nan")}, "finite")],
)
def test_weights_that_cannot_be(network, weights, message):
    add_random_lora(network)
    with pytest.raises(UserError, match=message):
        set_lora_weights(network, {"style": 0.5} | weights)
    assert get_lora_weights(network) == {"style": 1.0}


# --- training -----------------------------------------------------------------------------------


def test_gradients_flow_to_the_new_adapter_only(network):
    add_random_lora(network, "fixed", targets=["ffn.linear1"], seed=1)
    paths = add_lora(
        network, 4, alpha=8, targets=["self_attention.*_proj", "ffn.linear1"], name="new"
    )
    train_only(network, "new")
    assert QUERY in paths and "down_blocks.0.cross_attention.q_proj" not in paths
    wanted = {f"{path}.adapters.new.{part}" for path in paths for part in "ab"}
    assert set(dict(tree_flatten(network.trainable_parameters()))) == wanted

    def loss(model):
        return velocity(model).square().mean() + velocity(model, 0.5).square().mean()

    before = flat_parameters(network)
    step = nn.value_and_grad(network, loss)
    optimizer = optim.SGD(0.1)
    value, grads = step(network)
    grads = dict(tree_flatten(grads))
    assert set(grads) == wanted
    assert mx.abs(grads[f"{QUERY}.adapters.new.b"]).max().item() > 0
    for _ in range(5):
        optimizer.update(network, step(network)[1])
    assert step(network)[0].item() < value.item()
    after = flat_parameters(network)
    assert {k for k in after if not mx.array_equal(before[k], after[k])} == wanted


def test_loaded_adapters_are_frozen(network, tmp_path):
    add_random_lora(network, targets=["q_proj"])
    save_lora(tmp_path / "a.safetensors", network, name="style")
    remove_lora(network)
    network.unfreeze()
    trainable = set(dict(tree_flatten(network.trainable_parameters())))
    load_lora(tmp_path / "a.safetensors", network)
    frozen = set(dict(tree_flatten(network.trainable_parameters())))
    assert {k.replace(".linear.", ".") for k in frozen} == {
        k.replace(".linear.", ".") for k in trainable
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], r"no linear layer matches 'q_porj' \(near it: q_proj"),
        (["q_proj", "*.self_atention.*"], r"'\*\.self_atention\.\*' \(near it: .*self_attention"),
        (["ffn"], "no linear layer matches 'ffn'"),
        (["proj"], "no linear layer matches 'proj'"),
        ([], "at least one target"),
    ],
)
def test_targets_without_a_layer(network, targets, message):
    keys = list(flat_parameters(network))
    with pytest.raises(UserError, match=message):
        add_lora(network, 4, alpha=8, targets=targets)
    assert list(flat_parameters(network)) == keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank from 1"),
        ({"alpha": float("inf")}, "finite alpha"),
        ({"alpha": 0.0}, "alpha other than 0"),
        ({"name": "a.b"}, "letters, digits"),
        ({"name": "style"}, "'style' already"),
    ],
)
def test_adapters_that_cannot_be(network, settings, message):
    add_random_lora(network, targets=["q_proj"])
    with pytest.raises(UserError, match=message):
        add_lora(network, **{"rank": 4, "alpha": 8, "targets": ["v_proj"]} | settings)


# --- files --------------------------------------------------------------------------------------


def test_a_saved_adapter_is_the_same_loaded(network, tmp_path):
    add_random_lora(network, targets=["*_proj", "time.members.*.linear"], rank=4, alpha=6)
    before = [velocity(network, width) for width in WIDTHS]
    path = tmp_path / "new" / "style.safetensors"
    save_lora(path, network, name="style", base_model="random")
    assert os.listdir(path.parent) == ["style.safetensors"]
    tensors, header = mx.load(str(path), return_metadata=True)
    expected = {"format": "mlx", "name": "style", "rank": "4", "alpha": "6", "base_model": "random"}
    assert header == expected
    assert tensors[f"transformer.{QUERY}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"transformer.{QUERY}.lora_B.weight"].shape == (64, 4)
    assert tensors[f"transformer.{QUERY}.alpha"].item() == 6
    remove_lora(network)
    paths = load_lora(path, network)
    assert 3 * len(paths) == len(tensors)
    assert get_lora_weights(network) == {"style": 1.0}
    for width, expected in zip(WIDTHS, before, strict=True):
        assert mx.array_equal(velocity(network, width), expected)


STYLES = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft named": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "lightning": ("{}.lora_down.weight", "{}.lora_up.weight"),
    "comfy": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}


@pytest.mark.parametrize(
    ("style", "alpha"),
    [*((style, 8) for style in STYLES), ("lightning", None), ("diffusers", "header")],
)
def test_the_keys_of_others(network, tmp_path, style, alpha):
    """Each layer has an alpha of its own; without one it is the rank."""
    tensors, scales = {}, {}
    paths = [QUERY, "downsample.linear", "upsample.linear", "time.members.1.embedder.linear1"]
    header = {}
    if alpha == "header":
        config = {"transformer.r": 16, "transformer.lora_alpha": 12, "transformer.use_dora": False}
        header["lora_adapter_metadata"] = json.dumps(config)
    modules = dict(network.named_modules())
    for i, path in enumerate(paths):
        rank, (out_dims, in_dims) = 2 + i, modules[path].weight.shape
        keys = [
            k.format(path.replace(".", "_") if style == "kohya" else path) for k in STYLES[style]
        ]
        tensors[keys[0]] = mx.random.normal((rank, in_dims))
        tensors[keys[1]] = mx.random.normal((out_dims, rank)).astype(mx.bfloat16)
        scales[path] = {8: (8 + i) / rank, None: 1, "header": 12 / rank}[alpha]
        if alpha == 8:
            tensors[keys[0].split(".lora_")[0] + ".alpha"] = mx.array(8.0 + i)
        expected = scales[path] * (tensors[keys[1]].astype(mx.float32) @ tensors[keys[0]])
        scales[path] = modules[path].weight + 0.5 * expected
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors, header)
    assert set(load_lora(tmp_path / "x.safetensors", network, weight=0.5)) == set(paths)
    fuse_lora(network)
    for path, expected in scales.items():
        assert mx.allclose(dict(network.named_modules())[path].weight, expected, atol=1e-5)


def edited(network, path, edit, header=None):
    """A good file of a query projection's adapter, with `edit` applied to its tensors."""
    add_random_lora(network, targets=[QUERY])
    save_lora(path, network, name="style")
    remove_lora(network)
    tensors = mx.load(str(path))
    edit(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, header or {})


A, B, ALPHA = (
    f"transformer.{QUERY}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha")
)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({A.replace("q_proj", "q_porj"): t.pop(A)}),
            rf"self_attention.q_porj is no layer \(did you mean 'transformer.{QUERY}'",
        ),
        (lambda t: t.pop(A), f"{QUERY} lacks lora_A"),
        (lambda t: t.pop(B), f"{QUERY} lacks lora_B"),
        (lambda t: t.update({A: t[A][:, :32]}), r"lora_A \(4, 32\) instead of \(4, 64\)"),
        (lambda t: t.update({B: t[B][:, :3]}), r"lora_B \(64, 3\) instead of \(64, 4\)"),
        (lambda t: t.update({A: t[A][..., None, None]}), r"lora_A \(4, 64, 1, 1\) instead of"),
        (lambda t: t.update({A: t[A].astype(mx.int32)}), "whole numbers"),
        (lambda t: t.update({ALPHA: mx.array(float("nan"))}), "alpha that is not one finite"),
        (lambda t: t.update({ALPHA: mx.zeros((2,))}), "alpha that is not one finite"),
        (lambda t: t.update({ALPHA: mx.array(-1e30)}), "alpha that is not one finite"),
        (lambda t: t.update({ALPHA: mx.array(1j)}), "alpha that is not one finite"),
        (lambda t: t.update({ALPHA: mx.zeros(1)}), "has no effect: the alpha of its layers is 0"),
        (lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), f"{QUERY} has a LoRA of rank 0"),
        (lambda t: t.update({B: t[B] * mx.inf}), "damaged: it has weights that are not finite"),
        (lambda t: t.update({f"{QUERY}.lora_A.weight": t[A]}), "is there twice"),
        (
            lambda t: t.update({f"{QUERY}.dora_scale": t[A]}),
            "dora_scale is of a DoRA",
        ),
        (lambda t: t.update({f"{QUERY}.lora_C.weight": t[A]}), "lora_C.weight is no part"),
        (lambda t: t.update({f"x{i}.alpha": t[ALPHA] for i in range(5)}), "; and 2 more faults"),
        (lambda t: [t.clear(), t.update(x=mx.zeros(1))], "x is no part"),
    ],
)
def test_files_that_do_not_fit_change_nothing(network, tmp_path, edit, message):
    edited(network, tmp_path / "x.safetensors", edit)
    keys = list(flat_parameters(network))
    with pytest.raises(UserError, match=message) as error:
        load_lora(tmp_path / "x.safetensors", network)
    assert "\n" not in str(error.value)
    assert list(flat_parameters(network)) == keys


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"transformer.use_dora": true}', "'use_dora', which is not supported"),
        ('{"transformer.init_lora_weights": "pissa_niter_16"}', "'pissa_niter_16' has changed"),
        ('{"transformer.init_lora_weights": "loftq"}', "'loftq' has changed"),
        ('{"transformer.alora_invocation_tokens": [1]}', "'alora_invocation_tokens', which is"),
        ('{"transformer.alpha_pattern": {"x": 1}}', "alpha for 'x', which is none"),
        ('{"transformer.alpha_pattern": {"q_proj": "x"}}', "lora_alpha is no number"),
        ("[]", "damaged header"),
        ("{", "damaged header"),
    ],
)
def test_headers_that_cannot_be(network, tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    edited(network, path, lambda t: None, {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match=message):
        load_lora(path, network)


def test_weights_beyond_the_type_of_the_model_are_not_called_damage(network, tmp_path):
    edited(network, tmp_path / "x.safetensors", lambda t: t.update({A: t[A] + 1e6}))
    network.set_dtype(mx.float16)
    with pytest.raises(UserError, match="too large for the type of this model"):
        load_lora(tmp_path / "x.safetensors", network)


@pytest.mark.parametrize(("alpha", "scale"), [(-3.0, -0.75), (8, 2.0), (True, 0.25)])
def test_an_alpha_may_be_negative_or_whole(network, tmp_path, alpha, scale):
    path = tmp_path / "x.safetensors"
    edited(network, path, lambda t: t.update({ALPHA: mx.array(alpha)}))
    convert(find_source(str(path)), tmp_path / "out.safetensors", kind="lora")
    for file in (path, tmp_path / "out.safetensors"):
        [layer] = load_lora(file, network, name="x")
        assert adapted_layers(network)[layer].adapters["x"].scale == scale
        remove_lora(network)


def test_files_that_are_none(network, tmp_path):
    edited(network, tmp_path / "x.safetensors", lambda t: None)
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:-1])
    (tmp_path / "x.pt").write_bytes(data)
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in {
        "missing.safetensors": "no LoRA file",
        "folder.safetensors": "no LoRA file",
        "x.pt": "is not a .safetensors file",
        "short.safetensors": "is (damaged|truncated)",
    }.items():
        with pytest.raises(UserError, match=message):
            load_lora(tmp_path / name, network)
    with pytest.raises(UserError, match="finite"):
        load_lora(tmp_path / "x.safetensors", network, weight=float("inf"))
    load_lora(tmp_path / "x.safetensors", network)
    with pytest.raises(UserError, match="'x' already"):
        load_lora(tmp_path / "x.safetensors", network)


def test_a_file_is_written_whole_or_not_at_all(network, tmp_path, monkeypatch):
    add_random_lora(network, targets=["q_proj"])
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_lora(path, network, name="style")
    assert path.read_text() == "mine"
    for name, file, message in (
        ("style", "x.pt", "ending in .safetensors"),
        ("stile", "y.safetensors", "did you mean 'style'"),
        ("style", "x.safetensors/y.safetensors", "cannot write"),
    ):
        with pytest.raises(UserError, match=message):
            save_lora(tmp_path / file, network, name=name)

    def full(*args):
        raise RuntimeError("[write] Unable to write 2097246 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(UserError, match=r"cannot write .*Unable to write"):
        save_lora(tmp_path / "z.safetensors", network, name="style")
    assert os.listdir(tmp_path) == ["x.safetensors"]


# --- pipeline and command -----------------------------------------------------------------------


@pytest.fixture
def files(network, tmp_path):
    """Two LoRA files for the shared model."""
    paths = []
    for seed, targets in enumerate((["*"], ["*ffn*", "*_proj"])):
        add_random_lora(network, "x", targets=targets, seed=seed)
        paths.append(tmp_path / f"lora{seed}.safetensors")
        save_lora(paths[-1], network, name="x", base_model="random")
        remove_lora(network)
    return paths


def pixels(pipe):
    return np.array(pipe("a red apple", num_inference_steps=1)[0])


@pytest.mark.parametrize(("name", "width"), [("full", 1.0), ("tiny", 0.375)])
def test_the_pipeline_draws_with_loras(files, model_folder, tmp_path, name, width):
    loras = [(files[0], 0.5), (str(files[1]), -1)]
    pipe = SnapGenPipeline.from_pretrained(model_folder, model_width=name, loras=loras)
    recorded = [{"path": str(files[0]), "weight": 0.5}, {"path": str(files[1]), "weight": -1.0}]
    assert pipe.describe()["loras"] == recorded
    whole = load_pretrained(model_folder).transformer
    for i, (path, weight) in enumerate(loras):
        load_lora(path, whole, weight=weight, name=f"l{i}")
    assert differ(velocity(whole, width), velocity(pipe.transformer)) < 1e-5
    plain = SnapGenPipeline.from_pretrained(model_folder, model_width=name)
    assert plain.describe()["loras"] == []
    assert not np.array_equal(pixels(plain), pixels(pipe))
    off = SnapGenPipeline.from_pretrained(model_folder, model_width=name, loras=[(files[0], 0)])
    assert np.array_equal(pixels(plain), pixels(off))
    pipe.save_pretrained(tmp_path / "fused")
    assert np.array_equal(pixels(pipe), pixels(SnapGenPipeline.from_pretrained(tmp_path / "fused")))


def test_loras_are_fused_before_quantization(files, model_folder):
    """A quantized pipeline rounds the sum, not the base alone."""
    pipe = SnapGenPipeline.from_pretrained(model_folder, quantize=4, loras=[(files[0], 1)])
    expected = load_pretrained(model_folder).transformer
    load_lora(files[0], expected)
    fuse_lora(expected)
    quantize_transformer(alone := extract(expected, 1.0), 4)
    assert differ(velocity(pipe.transformer), velocity(alone)) < 1e-5


def test_a_lora_for_another_model_is_noticed(network, files, model_folder, tmp_path):
    add_random_lora(network, "x", targets=["q_proj"])
    save_lora(tmp_path / "other.safetensors", network, name="x", base_model="another")
    with pytest.warns(UserWarning, match="made for the model 'another', not 'random'"):
        SnapGenPipeline.from_pretrained(model_folder, loras=[(tmp_path / "other.safetensors", 1)])


def test_a_long_name_of_the_model_is_compared_as_a_whole(network, tmp_path):
    path, name = tmp_path / "style.safetensors", "a  model " * 20
    add_random_lora(network, "x", targets=["q_proj"])
    save_lora(path, network, name="x", base_model=name)
    remove_lora(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lora(path, network, base_model=name)
    remove_lora(network)
    with pytest.warns(UserWarning, match=r"the model 'a model .{20,50} model', not 'b'"):
        load_lora(path, network, base_model="b")


def test_a_missing_lora_is_found_before_the_model_is_loaded(model_folder, monkeypatch):
    monkeypatch.setattr("mlx_snapgen.pipeline.load_pretrained", None)
    with pytest.raises(UserError, match="no LoRA file"):
        SnapGenPipeline.from_pretrained(model_folder, loras=[("nowhere.safetensors", 1)])


def test_the_command_draws_with_loras_and_knows_them_again(files, model_folder, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    base = ["a red apple", "--model", str(model_folder), "--steps", "1", "--seed", "3"]
    main([*base, "-o", "plain.png"])
    main([*base, "-o", "styled.png", "--lora", str(files[0]), "0.5", "--lora", str(files[1])])
    recorded = [{"path": str(files[0]), "weight": 0.5}, {"path": str(files[1]), "weight": 1.0}]
    assert read_metadata("styled.png")["loras"] == recorded
    assert read_metadata("plain.png")["loras"] == []
    assert not np.array_equal(np.array(Image.open("plain.png")), np.array(Image.open("styled.png")))
    with pytest.raises(UserError, match=r"drawn with the model .*, the LoRA .*: --trust-settings"):
        main(["--config-from-image", "styled.png", "-o", "again.png"])
    main(["--config-from-image", "styled.png", "-o", "again.png", "--trust-settings"])
    assert Path("again.png").read_bytes() == Path("styled.png").read_bytes()
    main(["--config-from-image", "styled.png", "-o", "less.png", "--lora", str(files[0]), "0",
          "--model", str(model_folder)])  # fmt: skip
    assert np.array_equal(np.array(Image.open("plain.png")), np.array(Image.open("less.png")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", "--lora"], "--lora: expected at least one argument"),
        (["--lora", "x.safetensors", "a cat"], "a number expected, not 'a cat' (prompts go before"),
        (["--lora", "x.safetensors", "1", "a cat"], "'a cat' follows a file and its scale"),
        (["a cat", "--lora", "x.safetensors", "nan"], "a finite number expected"),
        (["a cat", "--lora", "x.safetensors"], "no LoRA file x.safetensors"),
        (["a cat", "--lora", "x.pt"], "no LoRA file x.pt"),
    ],
)
def test_mistakes_with_loras_are_one_line(
    capsys, model_folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main([*arguments, "--model", str(model_folder)]))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_picture_without_a_word_on_loras_is_repeated(model_folder, tmp_path, monkeypatch):
    """Pictures made before LoRAs existed."""
    from mlx_snapgen.metadata import save_picture

    monkeypatch.chdir(tmp_path)
    main(["a cat", "--model", str(model_folder), "--steps", "1", "-o", "new.png"])
    old = read_metadata("new.png")
    del old["loras"]
    save_picture(Image.open("new.png"), "old.png", metadata=old)
    main(["--config-from-image", "old.png", "-o", "again.png", "--trust-settings"])
    assert np.array_equal(np.array(Image.open("again.png")), np.array(Image.open("new.png")))
    save_picture(Image.open("new.png"), "odd.png", metadata=old | {"loras": [{"path": "x"}]})
    with pytest.raises(UserError, match="no usable 'loras'"):
        main(["--config-from-image", "odd.png"])


def test_scale_is_weight_times_alpha_over_rank():
    """alpha 8 at rank 64, as in Qwen-Image-Lightning, is 1/8."""
    assert Adapter(mx.zeros((64, 2)), mx.zeros((2, 64)), alpha=8).scale == 0.125
    assert Adapter(mx.zeros((64, 2)), mx.zeros((2, 64)), alpha=8, weight=0.5).scale == 0.0625


def test_a_model_with_adapters_is_not_saved(model_folder, tmp_path):
    components = load_pretrained(model_folder)
    add_lora(components.transformer, 2, alpha=2.0, targets=["q_proj"], name="mine")
    with pytest.raises(UserError, match=r"fuse or remove the LoRAs first .mine."):
        save_pretrained(tmp_path / "out", components)
    assert not (tmp_path / "out").exists()
