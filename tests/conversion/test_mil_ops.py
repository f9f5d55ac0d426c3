"""Every operation of the interpreter, as coremltools writes it, against numpy or torch."""

import math

import numpy as np
import pytest

from convert.mil.execution import Interpreter
from convert.mil.ops import OPS
from tests.tiny import require

require("coremltools", "torch")

import coremltools as ct  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


INPUTS = {
    "x": normal(2, 4, 6, 5),
    "y": normal(2, 4, 6, 5),
    "w": normal(2, 5, 6, 3),
    "q": normal(2, 3, 7, 4),
    "k": normal(2, 3, 5, 4),
    "n": np.array([[3, -4, 5], [-6, 7, 0]], np.int32),
    "index": np.array([[2, 0], [3, 1]], np.int32),
    "cell": RNG.integers(0, 4, (2, 3, 6, 5)).astype(np.int32),
}
SHAPES = {name: value.shape for name, value in INPUTS.items()}
POSITIVE = "p"
"""Of x: all positive, away from the edges of square root and logarithm."""


def kernel(*shape):
    return normal(*shape) / math.sqrt(math.prod(shape[1:]))


W3, B3 = kernel(8, 4, 3, 3), normal(8)
DEPTHWISE, GROUPED, PATCH = kernel(4, 1, 3, 3), kernel(6, 2, 3, 2), kernel(8, 4, 2, 2)
UP, UP_GROUPED = kernel(4, 3, 4, 4), kernel(4, 2, 3, 3)
LINEAR, BIAS, GAMMA, BETA = kernel(7, 5), normal(7), normal(6, 5), normal(6, 5)
MASK = normal(7, 5)


def case(build, expected):
    return build, expected


def unary(name, f, of="x"):
    return case(lambda v: getattr(mb, name)(x=v[of]), lambda v: f(v[of]))


def binary(name, f, of=("x", "y")):
    return case(
        lambda v: getattr(mb, name)(x=v[of[0]], y=v[of[1]]), lambda v: f(v[of[0]], v[of[1]])
    )


def bools(name, f):
    """An operation on truths; as numbers, since outputs are no truths."""

    def build(v):
        a, b = mb.greater(x=v["x"], y=0.0), mb.greater(x=v["y"], y=0.0)
        arguments = {"x": a} if name == "logical_not" else {"x": a, "y": b}
        return mb.cast(x=getattr(mb, name)(**arguments), dtype="fp32")

    return case(build, lambda v: f(v["x"] > 0, v["y"] > 0).astype(np.float32))


def compared(name, f):
    """A comparison of whole numbers with a constant that some of them equal."""
    return case(
        lambda v: mb.cast(x=getattr(mb, name)(x=v["n"], y=np.int32(5)), dtype="int32"),
        lambda v: f(v["n"], 5).astype(np.int32),
    )


def reduced(name, f):
    return case(
        lambda v: getattr(mb, f"reduce_{name}")(x=v["x"], axes=[1, -1], keep_dims=True),
        lambda v: f(v["x"], (1, 3)),
    )


def of_torch(build, f):
    """`f` takes torch tensors by name."""
    return case(build, lambda v: f({k: torch.from_numpy(a) for k, a in v.items()}))


def rows(**how):
    return lambda v: mb.slice_by_index(x=v["x"], **how)


CASES = {
    "add": binary("add", np.add),
    "sub": binary("sub", np.subtract),
    "mul": binary("mul", np.multiply),
    "real_div": binary("real_div", np.divide, ("x", POSITIVE)),
    "floor_div": case(
        lambda v: mb.floor_div(x=v["n"], y=np.int32(4)), lambda v: np.floor_divide(v["n"], 4)
    ),
    "mod": case(lambda v: mb.mod(x=v["n"], y=np.int32(4)), lambda v: np.mod(v["n"], 4)),
    "pow": binary("pow", np.power, (POSITIVE, "y")),
    "maximum": binary("maximum", np.maximum),
    "minimum": binary("minimum", np.minimum),
    "equal": compared("equal", np.equal),
    "not_equal": compared("not_equal", np.not_equal),
    "greater": compared("greater", np.greater),
    "greater_equal": compared("greater_equal", np.greater_equal),
    "less": compared("less", np.less),
    "less_equal": compared("less_equal", np.less_equal),
    "logical_and": bools("logical_and", np.logical_and),
    "logical_or": bools("logical_or", np.logical_or),
    "logical_not": bools("logical_not", lambda a, b: ~a),
    "abs": unary("abs", np.abs),
    "sign": unary("sign", np.sign),
    "floor": unary("floor", np.floor),
    "ceil": unary("ceil", np.ceil),
    "round": unary("round", np.round),
    "exp": unary("exp", np.exp),
    "sin": unary("sin", np.sin),
    "cos": unary("cos", np.cos),
    "tanh": unary("tanh", np.tanh),
    "erf": of_torch(lambda v: mb.erf(x=v["x"]), lambda v: torch.erf(v["x"])),
    "sqrt": unary("sqrt", np.sqrt, POSITIVE),
    "square": unary("square", np.square),
    "rsqrt": unary("rsqrt", lambda p: 1 / np.sqrt(p), POSITIVE),
    "log": unary("log", np.log, POSITIVE),
    "inverse": unary("inverse", lambda p: 1 / (p + 1e-4), POSITIVE),
    "identity": unary("identity", lambda x: x),
    "relu": unary("relu", lambda x: np.maximum(x, 0)),
    "leaky_relu": of_torch(
        lambda v: mb.leaky_relu(x=v["x"], alpha=0.1), lambda v: F.leaky_relu(v["x"], 0.1)
    ),
    "sigmoid": of_torch(lambda v: mb.sigmoid(x=v["x"]), lambda v: torch.sigmoid(v["x"])),
    "silu": of_torch(lambda v: mb.silu(x=v["x"]), lambda v: F.silu(v["x"])),
    "gelu": of_torch(lambda v: mb.gelu(x=v["x"]), lambda v: F.gelu(v["x"])),
    "gelu tanh": of_torch(
        lambda v: mb.gelu(x=v["x"], mode="TANH_APPROXIMATION"),
        lambda v: F.gelu(v["x"], approximate="tanh"),
    ),
    "gelu sigmoid": of_torch(
        lambda v: mb.gelu(x=v["x"], mode="SIGMOID_APPROXIMATION"),
        lambda v: v["x"] * torch.sigmoid(1.702 * v["x"]),
    ),
    "clip": case(
        lambda v: mb.clip(x=v["x"], alpha=-0.5, beta=0.25), lambda v: np.clip(v["x"], -0.5, 0.25)
    ),
    "cast": case(
        lambda v: mb.cast(x=mb.mul(x=v["x"], y=3.0), dtype="int32"),
        lambda v: np.trunc(v["x"] * 3).astype(np.int32),
    ),
    "select": case(
        lambda v: mb.select(cond=mb.greater(x=v["x"], y=v["y"]), a=v["x"], b=v["y"]),
        lambda v: np.maximum(v["x"], v["y"]),
    ),
    "reduce_sum": reduced("sum", lambda x, a: x.sum(a, keepdims=True)),
    "reduce_mean": reduced("mean", lambda x, a: x.mean(a, keepdims=True)),
    "reduce_max": reduced("max", lambda x, a: x.max(a, keepdims=True)),
    "reduce_min": reduced("min", lambda x, a: x.min(a, keepdims=True)),
    "reduce_prod": reduced("prod", lambda x, a: x.prod(a, keepdims=True)),
    "reduce_sum_square": reduced("sum_square", lambda x, a: (x**2).sum(a, keepdims=True)),
    "reduce_l1_norm": reduced("l1_norm", lambda x, a: np.abs(x).sum(a, keepdims=True)),
    "reduce_l2_norm": reduced("l2_norm", lambda x, a: np.linalg.norm(x, None, a, True)),
    "reduce_mean of all": case(
        lambda v: mb.reduce_mean(x=v["x"], axes=[0, 1, 2, 3], keep_dims=False),
        lambda v: v["x"].mean(),
    ),
    "reduce_argmax": case(
        lambda v: mb.reduce_argmax(x=v["x"], axis=2, keep_dims=False),
        lambda v: v["x"].argmax(2).astype(np.int32),
    ),
    "softmax": of_torch(lambda v: mb.softmax(x=v["x"], axis=1), lambda v: torch.softmax(v["x"], 1)),
    "layer_norm": of_torch(
        lambda v: mb.layer_norm(x=v["x"], axes=[-2, -1], gamma=GAMMA, beta=BETA, epsilon=1e-3),
        lambda v: F.layer_norm(v["x"], (6, 5), torch.tensor(GAMMA), torch.tensor(BETA), 1e-3),
    ),
    "layer_norm of channels": of_torch(
        lambda v: mb.layer_norm(x=v["x"], axes=[1], gamma=BETA[0, :4]),
        lambda v: F.layer_norm(v["x"].movedim(1, -1), (4,), torch.tensor(BETA[0, :4])).movedim(
            -1, 1
        ),
    ),
    "batch_norm": of_torch(
        lambda v: mb.batch_norm(
            x=v["x"], mean=B3[:4], variance=B3[:4] ** 2, gamma=B3[4:], beta=B3[2:6], epsilon=1e-3
        ),
        lambda v: F.batch_norm(
            v["x"],
            *(torch.tensor(p) for p in (B3[:4], B3[:4] ** 2, B3[4:], B3[2:6])),
            eps=1e-3,
        ),
    ),
    "instance_norm": of_torch(
        lambda v: mb.instance_norm(x=v["x"], gamma=B3[4:], beta=B3[2:6]),
        lambda v: F.instance_norm(v["x"], weight=torch.tensor(B3[4:]), bias=torch.tensor(B3[2:6])),
    ),
    "matmul": of_torch(
        lambda v: mb.matmul(x=v["q"], y=v["k"], transpose_y=True), lambda v: v["q"] @ v["k"].mT
    ),
    "matmul transposed": of_torch(
        lambda v: mb.matmul(x=v["x"], y=v["y"], transpose_x=True), lambda v: v["x"].mT @ v["y"]
    ),
    "linear": of_torch(
        lambda v: mb.linear(
            x=mb.squeeze(x=rows(begin=[0] * 4, end=[1, 4, 6, 5])(v), axes=[0]),
            weight=LINEAR,
            bias=BIAS,
        ),
        lambda v: F.linear(v["x"][0], torch.tensor(LINEAR), torch.tensor(BIAS)),
    ),
    "einsum": of_torch(
        lambda v: mb.einsum(values=(v["x"], v["w"]), equation="nchw,nwhu->nchu"),
        lambda v: torch.einsum("nchw,nwhu->nchu", v["x"], v["w"]),
    ),
    "scaled_dot_product_attention": of_torch(
        lambda v: mb.scaled_dot_product_attention(query=v["q"], key=v["k"], value=v["k"]),
        lambda v: F.scaled_dot_product_attention(v["q"], v["k"], v["k"]),
    ),
    "scaled_dot_product_attention with a mask": of_torch(
        lambda v: mb.scaled_dot_product_attention(
            query=v["q"], key=v["k"], value=v["k"], attn_mask=MASK > -0.5
        ),
        lambda v: F.scaled_dot_product_attention(v["q"], v["k"], v["k"], torch.tensor(MASK > -0.5)),
    ),
    "scaled_dot_product_attention with a bias": of_torch(
        lambda v: mb.scaled_dot_product_attention(
            query=v["q"], key=v["k"], value=v["k"], attn_mask=MASK
        ),
        lambda v: F.scaled_dot_product_attention(v["q"], v["k"], v["k"], torch.tensor(MASK)),
    ),
    "conv": of_torch(
        lambda v: mb.conv(x=v["x"], weight=W3, bias=B3, pad_type="custom", pad=[1, 1, 1, 1]),
        lambda v: F.conv2d(v["x"], torch.tensor(W3), torch.tensor(B3), padding=1),
    ),
    "conv same": of_torch(
        lambda v: mb.conv(x=v["x"], weight=W3, pad_type="same"),
        lambda v: F.conv2d(v["x"], torch.tensor(W3), padding="same"),
    ),
    "conv with strides": of_torch(
        lambda v: mb.conv(x=v["x"], weight=PATCH, strides=[2, 2], pad_type="valid"),
        lambda v: F.conv2d(v["x"], torch.tensor(PATCH), stride=2),
    ),
    "conv depthwise": of_torch(
        lambda v: mb.conv(
            x=v["x"], weight=DEPTHWISE, pad_type="custom", pad=[1, 1, 1, 1], groups=4
        ),
        lambda v: F.conv2d(v["x"], torch.tensor(DEPTHWISE), padding=1, groups=4),
    ),
    "conv grouped and dilated": of_torch(
        lambda v: mb.conv(
            x=v["x"],
            weight=GROUPED,
            pad_type="custom",
            pad=[2, 2, 0, 0],
            dilations=[2, 1],
            groups=2,
        ),
        lambda v: F.conv2d(
            v["x"], torch.tensor(GROUPED), padding=(2, 0), dilation=(2, 1), groups=2
        ),
    ),
    "conv of a line": of_torch(
        lambda v: mb.conv(
            x=mb.reshape(x=v["x"], shape=[2, 4, 30]), weight=W3[..., 0], pad_type="valid"
        ),
        lambda v: F.conv1d(v["x"].reshape(2, 4, 30), torch.tensor(W3[..., 0])),
    ),
    "conv_transpose": of_torch(
        lambda v: mb.conv_transpose(
            x=v["x"], weight=UP, bias=B3[:3], pad_type="custom", pad=[1, 1, 1, 1], strides=[2, 2]
        ),
        lambda v: F.conv_transpose2d(
            v["x"], torch.tensor(UP), torch.tensor(B3[:3]), stride=2, padding=1
        ),
    ),
    "conv_transpose grouped": of_torch(
        lambda v: mb.conv_transpose(
            x=v["x"], weight=UP_GROUPED, strides=[2, 1], dilations=[1, 2], groups=2
        ),
        lambda v: F.conv_transpose2d(
            v["x"], torch.tensor(UP_GROUPED), stride=(2, 1), dilation=(1, 2), groups=2
        ),
    ),
    "conv_transpose to a size": of_torch(
        lambda v: mb.conv_transpose(
            x=v["x"],
            weight=UP_GROUPED,
            strides=[2, 2],
            groups=2,
            pad_type="custom",
            pad=[1, 0, 1, 0],
            output_shape=[2, 4, 12, 10],
        ),
        lambda v: F.conv_transpose2d(
            v["x"], torch.tensor(UP_GROUPED), stride=2, padding=1, output_padding=1, groups=2
        ),
    ),
    "transpose": case(
        lambda v: mb.transpose(x=v["x"], perm=[0, 3, 1, 2]), lambda v: v["x"].transpose(0, 3, 1, 2)
    ),
    "reshape": case(
        lambda v: mb.reshape(x=v["x"], shape=[2, -1, 10]), lambda v: v["x"].reshape(2, -1, 10)
    ),
    "reshape that keeps": case(
        lambda v: mb.reshape(x=v["x"], shape=[0, 2, 0, -1]), lambda v: v["x"].reshape(2, 2, 6, 10)
    ),
    "expand_dims": case(
        lambda v: mb.expand_dims(x=v["n"], axes=[0, -1]), lambda v: v["n"][None, ..., None]
    ),
    "squeeze": case(
        lambda v: mb.squeeze(x=mb.reduce_max(x=v["x"], axes=[1, 3], keep_dims=True), axes=[3]),
        lambda v: v["x"].max((1, 3))[:, None],
    ),
    "squeeze of all": case(
        lambda v: mb.squeeze(x=mb.reduce_max(x=v["x"], axes=[1, 3], keep_dims=True)),
        lambda v: v["x"].max((1, 3)),
    ),
    "concat": case(
        lambda v: mb.concat(values=(v["x"], v["y"]), axis=-2),
        lambda v: np.concatenate([v["x"], v["y"]], -2),
    ),
    "concat of one": case(lambda v: mb.concat(values=(v["x"],), axis=1), lambda v: v["x"]),
    "concat interleaved": case(
        lambda v: mb.concat(values=(v["x"], v["y"]), axis=1, interleave=True),
        lambda v: np.stack([v["x"], v["y"]], 2).reshape(2, 8, 6, 5),
    ),
    "stack": case(
        lambda v: mb.stack(values=(v["x"], v["y"]), axis=1),
        lambda v: np.stack([v["x"], v["y"]], 1),
    ),
    "split": case(
        lambda v: mb.split(x=v["x"], axis=1, split_sizes=[1, 3])[1], lambda v: v["x"][:, 1:]
    ),
    "split evenly": case(
        lambda v: mb.split(x=v["x"], axis=2, num_splits=3)[1], lambda v: v["x"][:, :, 2:4]
    ),
    "slice_by_index": case(
        rows(begin=[0, 1, -4, 0], end=[2, 4, -1, 5], stride=[1, 2, 1, 3]),
        lambda v: v["x"][:, 1:4:2, -4:-1, ::3],
    ),
    "slice_by_index with masks": case(
        rows(
            begin=[1, 3, 2, 1],
            end=[9, 1, 4, 1],
            begin_mask=[False, True, False, False],
            end_mask=[False, False, True, True],
            squeeze_mask=[True, False, False, False],
        ),
        lambda v: v["x"][1, :1, 2:, 1:],
    ),
    "slice_by_index backwards": case(
        rows(
            begin=[0, 0, 5, 0],
            end=[2, 4, 0, 5],
            stride=[1, 1, -2, 1],
            end_mask=[False, False, True, False],
        ),
        lambda v: v["x"][:, :, ::-2],
    ),
    "slice_by_size": case(
        lambda v: mb.slice_by_size(x=v["x"], begin=[0, 1, -3, 0], size=[-1, 2, 2, 5]),
        lambda v: v["x"][:, 1:3, 3:5],
    ),
    "tile": case(
        lambda v: mb.tile(x=v["x"], reps=[1, 3, 1, 2]), lambda v: np.tile(v["x"], (1, 3, 1, 2))
    ),
    "pad": case(
        lambda v: mb.pad(x=v["x"], pad=[1, 0, 2, 3], mode="constant", constant_val=1.5),
        lambda v: np.pad(v["x"], [(0, 0), (0, 0), (1, 0), (2, 3)], constant_values=1.5),
    ),
    "pad reflect": of_torch(
        lambda v: mb.pad(x=v["x"], pad=[1, 2, 2, 0], mode="reflect"),
        lambda v: F.pad(v["x"], (2, 0, 1, 2), "reflect"),
    ),
    "pad replicate": of_torch(
        lambda v: mb.pad(x=v["x"], pad=[1, 2, 2, 0], mode="replicate"),
        lambda v: F.pad(v["x"], (2, 0, 1, 2), "replicate"),
    ),
    "gather": case(
        lambda v: mb.gather(x=v["x"], indices=v["index"], axis=1),
        lambda v: v["x"][:, v["index"]],
    ),
    "gather in batches": case(
        lambda v: mb.gather(x=v["x"], indices=v["index"], axis=2, batch_dims=1),
        lambda v: np.stack([x[:, i] for x, i in zip(v["x"], v["index"], strict=True)]),
    ),
    "gather_along_axis": of_torch(
        lambda v: mb.gather_along_axis(x=v["x"], indices=v["cell"], axis=1),
        lambda v: torch.gather(v["x"], 1, v["cell"].long()),
    ),
    "upsample_nearest_neighbor": of_torch(
        lambda v: mb.upsample_nearest_neighbor(
            x=v["x"], scale_factor_height=2, scale_factor_width=3
        ),
        lambda v: F.interpolate(v["x"], scale_factor=(2, 3)),
    ),
    "pixel_shuffle": of_torch(
        lambda v: mb.pixel_shuffle(x=v["x"], upscale_factor=2), lambda v: F.pixel_shuffle(v["x"], 2)
    ),
    "pixel_unshuffle": of_torch(
        lambda v: mb.pixel_unshuffle(
            x=mb.slice_by_size(x=v["x"], begin=[0] * 4, size=[2, 4, 6, 4]),
            downscale_factor=np.uint32(2),
        ),
        lambda v: F.pixel_unshuffle(v["x"][..., :4], 2),
    ),
}


ELSEWHERE = {name for name in OPS if name.startswith("constexpr_")}
"""Compressed weights are in test_mil_interpreter.py."""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """One program with an output for each case, saved as it stands: no pass rewrites it."""
    kinds = {np.dtype(np.float32): types.fp32, np.dtype(np.int32): types.int32}
    specs = [mb.TensorSpec(shape=v.shape, dtype=kinds[v.dtype]) for v in INPUTS.values()]

    @mb.program(input_specs=specs, opset_version=ct.target.iOS18)
    def program(x, y, w, q, k, n, index, cell):
        v = {"x": x, "y": y, "w": w, "q": q, "k": k, "n": n, "index": index, "cell": cell}
        v[POSITIVE] = mb.add(x=mb.abs(x=x), y=0.1)
        outputs = []
        for i, (build, _) in enumerate(CASES.values()):
            outputs.append(build(v))
            outputs[-1].name = f"case_{i}"
        return tuple(outputs)

    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    model.save(str(path))
    return Interpreter(path)


@pytest.fixture(scope="module")
def outputs(package):
    return package(INPUTS)


@pytest.mark.parametrize("name", CASES)
def test_operation(name, outputs):
    positive = {POSITIVE: np.abs(INPUTS["x"]) + np.float32(0.1)}
    expected = np.asarray(CASES[name][1](INPUTS | positive))
    found = outputs[f"case_{list(CASES).index(name)}"]
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_every_operation_is_among_the_cases(package):
    saved = {o.type for o in package.package.function().operations}
    assert set(OPS) - ELSEWHERE <= saved
