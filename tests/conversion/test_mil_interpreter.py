"""Converted networks through the interpreter against torch, and what it makes of faulty ones."""

import shutil
import tracemalloc

import numpy as np
import pytest

from convert.mil import interpreter
from convert.mil.execution import Interpreter, run
from convert.mil.program import Package
from convert.mil.summary import summary
from convert.mil.weights import Blob
from convert.parity.originals import relative_difference
from mlx_snapgen.errors import UserError
from mlx_snapgen.pictures import psnr
from tests.tiny import require

require("coremltools", "torch")

import coremltools as ct  # noqa: E402
import coremltools.optimize.coreml as optimize  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402

CHANNELS, HEADS, SIDE = 32, 2, 4
TOKENS = SIDE * SIDE


class Block(torch.nn.Module):
    """What a transformer block is made of, small: RoPE, attention, a gate, convolutions."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Conv2d(CHANNELS, 3 * CHANNELS, 1)
        self.out = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = torch.nn.LayerNorm(CHANNELS)
        self.up = torch.nn.ConvTranspose2d(CHANNELS, 12, 2, stride=2)
        angles = torch.rand(TOKENS, CHANNELS // HEADS // 2) * 3
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))
        self.register_buffer("gate", torch.rand(1, CHANNELS, 1, 1) + 0.5)

    def rotate(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin

    def forward(self, x, timestep):
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * (1 + timestep)
        y = self.qkv(y).reshape(1, 3, HEADS, CHANNELS // HEADS, TOKENS).transpose(-1, -2)
        q, k, v = y[:, 0], y[:, 1], y[:, 2]
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)
        y = self.out(y.transpose(-1, -2).reshape(1, CHANNELS, SIDE, SIDE))
        x = x + self.gate * F.gelu(y, approximate="tanh")
        x = F.interpolate(F.silu(x), scale_factor=2)
        return F.pixel_shuffle(self.up(x), 2)


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    for p in (block.qkv.weight, block.out.weight):  # large enough that attention matters
        p.normal_(0, 2 * p[0].numel() ** -0.5)
    return block


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(1, CHANNELS, SIDE, SIDE)).astype(np.float32),
        "timestep": np.array([0.75], np.float32),
    }


@pytest.fixture(scope="module")
def expected(block, inputs):
    return block(*(torch.tensor(v) for v in inputs.values())).numpy()


def convert(module, inputs, precision, target):
    example = tuple(torch.tensor(v) for v in inputs.values())
    return ct.convert(
        torch.jit.trace(module, example),
        inputs=[ct.TensorType(name=n, shape=v.shape) for n, v in inputs.items()],
        outputs=[ct.TensorType(name="image", dtype=np.float32)],
        convert_to="mlprogram",
        compute_precision=precision,
        minimum_deployment_target=target,
        skip_model_load=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


def saved(model, path):
    model.save(str(path))
    return path


@pytest.fixture(scope="module")
def float32_model(block, inputs):
    return convert(block, inputs, ct.precision.FLOAT32, ct.target.iOS16)


@pytest.fixture(scope="module")
def float32(float32_model, folder):
    return saved(float32_model, folder / "float32.mlpackage")


@pytest.fixture(scope="module")
def fp16_model(block, inputs):
    return convert(block, inputs, ct.precision.FLOAT16, ct.target.iOS18)


@pytest.fixture(scope="module")
def fp16(fp16_model, folder):
    return saved(fp16_model, folder / "fp16.mlpackage")


def test_float32_equals_torch(float32, inputs, expected):
    found = run(float32, inputs)["image"]
    assert found.shape == expected.shape == (1, 3, 32, 32)
    assert relative_difference(found, expected) < 1e-5


def test_fp16_is_near_torch(fp16, inputs, expected):
    rounded, kept = (run(fp16, inputs, keep_float32=k)["image"] for k in (False, True))
    assert 60 < psnr(rounded, expected, peak=np.ptp(expected)) < 100
    # What is left is the rounding of the weights.
    assert (
        psnr(kept, expected, peak=np.ptp(expected))
        > psnr(rounded, expected, peak=np.ptp(expected)) + 3
    )


def test_runs_repeat(fp16, inputs):
    interpreter = Interpreter(fp16, keep_weights=True)
    first, second = interpreter(inputs), interpreter(inputs)
    np.testing.assert_array_equal(first["image"], second["image"])
    assert str(interpreter.inputs["timestep"]) == "fp16 (1)"
    assert list(interpreter.outputs) == ["image"]


# --- what the check notices -------------------------------------------------------------------


def scaled(package, folder, shape, factor):
    """A copy of the package whose first constant of `shape` is `factor` times what it was."""
    copy = folder / f"{package.stem}-{factor}-{len(shape)}.mlpackage"
    shutil.copytree(package, copy)
    read = Package(copy)
    blob = next(
        b.value
        for op in read.function().operations
        for b in op.inputs.get("val", [])
        if isinstance(b.value, Blob) and b.value.type.shape == shape
    )
    weights = read.model_file.parent / blob.file.removeprefix("@model_path/")
    old = np.ascontiguousarray(read.read(blob))
    data = weights.read_bytes()
    place = data.index(old.tobytes(), blob.offset)
    new = (old * factor).astype(old.dtype).tobytes()
    weights.write_bytes(data[:place] + new + data[place + len(new) :])
    return copy


@pytest.mark.parametrize(
    ("shape", "factor"),
    [((TOKENS, CHANNELS // HEADS), 1.01), ((1, CHANNELS, 1, 1), 1.05)],
    ids=["RoPE table", "gate"],
)
def test_a_wrong_constant_is_noticed(float32, fp16, folder, inputs, expected, shape, factor):
    exact = run(scaled(float32, folder, shape, factor), inputs)["image"]
    assert relative_difference(exact, expected) > 1e-4
    rounded = run(scaled(fp16, folder, shape, factor), inputs)["image"]
    assert psnr(rounded, expected, peak=np.ptp(expected)) < 58


# --- compressed weights -----------------------------------------------------------------------


def save(folder, name, build, target, *, shape=(1, 12)):
    """One program of x, with no pass that would fold its weights."""
    program = mb.program(
        input_specs=[mb.TensorSpec(shape=shape, dtype=types.fp32)], opset_version=target
    )(build)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(folder / name))
    return folder / name


def stored_as(array, dtype):
    return array.astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


X = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32)
PALETTE_BITS = (1, 2, 3, 4, 6, 8)
SCALED = ("int4", "uint4", "int8", "uint8")


@pytest.fixture(scope="module")
def compressed(folder):
    """A package of compressed weights (6, 12), and what each of them is."""
    rng = np.random.default_rng(2)
    rows, columns = np.indices((6, 12))
    weights, dense = {}, {}
    for bits in PALETTE_BITS:
        indices = rng.integers(0, 2**bits, (6, 12))
        lut = rng.normal(size=(3, 2, 2**bits, 1)).astype(np.float32)
        weights[f"lut{bits}"] = (
            mb.constexpr_lut_to_dense,
            {"indices": stored_as(indices, f"uint{bits}"), "lut": lut},
        )
        dense[f"lut{bits}"] = lut[rows // 2, columns // 6, indices, 0]
    indices = rng.integers(0, 4, (3, 12))
    lut = rng.normal(size=(1, 3, 4, 2)).astype(np.float32)
    weights["vectors"] = (
        mb.constexpr_lut_to_dense,
        {"indices": stored_as(indices, "uint2"), "lut": lut, "vector_axis": 0},
    )
    dense["vectors"] = lut[0, columns // 4, indices[rows // 2, columns], rows % 2]
    for dtype in SCALED:
        low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128)}.get(dtype, (0, 256))
        data, offset = rng.integers(low, high, (6, 12)), rng.integers(low, high, (6, 3))
        scale = rng.normal(size=(6, 3)).astype(np.float32)
        weights[dtype] = (
            mb.constexpr_blockwise_shift_scale,
            {
                "data": stored_as(data, dtype),
                "scale": scale,
                "offset": stored_as(offset, dtype),
            },
        )
        dense[dtype] = (data - offset[rows, columns // 4]) * scale[rows, columns // 4]

    def build(x):
        return tuple(
            mb.linear(x=x, weight=op(**parts), name=f"y_{name}")
            for name, (op, parts) in weights.items()
        )

    return save(folder, "compressed.mlpackage", build, ct.target.iOS18), dense


@pytest.mark.parametrize("name", [*(f"lut{bits}" for bits in PALETTE_BITS), "vectors", *SCALED])
def test_compressed_weights(name, compressed):
    path, dense = compressed
    found = run(path, {"x": X})[f"y_{name}"]
    np.testing.assert_allclose(
        found, X @ dense[name].T, rtol=1e-5, atol=2e-6 * abs(dense[name]).max()
    )


def test_palettes_are_counted(compressed):
    found = summary(compressed[0])
    assert found["palettized_weights"] == len(PALETTE_BITS) + 1
    assert found["palettes"] == 6 * len(PALETTE_BITS) + 3
    assert found["weights"] == 72 * (len(PALETTE_BITS) + 1 + len(SCALED))
    indices = 72 * sum(PALETTE_BITS) + 36 * 2
    palettes = 6 * sum(2**bits for bits in PALETTE_BITS) + 3 * 4 * 2
    data = 72 * (4 + 4 + 8 + 8) + 18 * (4 + 4 + 8 + 8)
    stored = indices + 32 * palettes + data + 32 * 18 * len(SCALED)
    assert found["bits_per_weight"] == pytest.approx(stored / found["weights"], abs=1e-3)


def test_affine_weights_and_casts(folder):
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (6, 12)).astype(np.uint8)
    zero = rng.integers(0, 256, 6).astype(np.uint8)
    scale = rng.normal(size=6).astype(np.float32)
    bias = rng.normal(size=(1, 12)).astype(np.float16)

    def build(x):
        weight = mb.constexpr_affine_dequantize(
            quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(0)
        )
        x = mb.add(x=x, y=mb.constexpr_cast(source_val=bias, output_dtype="fp32"))
        return mb.linear(x=x, weight=weight, name="y")

    path = save(folder, "affine.mlpackage", build, ct.target.iOS16)
    weight = (data.astype(np.float32) - zero[:, None]) * scale[:, None]
    np.testing.assert_allclose(run(path, {"x": X})["y"], (X + bias) @ weight.T, 1e-5, 1e-3)


def palettized(model, **how):
    how = optimize.OpPalettizerConfig(mode="kmeans", weight_threshold=500, **how)
    config = optimize.OptimizationConfig(op_type_configs={"conv": how})
    return optimize.palettize_weights(model, config)


@pytest.mark.parametrize(
    ("which", "palettes", "at_least", "how"),
    [
        ("fp16_model", 2, 15, {"nbits": 4}),
        ("fp16_model", 16, 15, {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 8}),
        ("float32_model", 2, 35, {"nbits": 8}),  # for iOS 16, with its own form
    ],
    ids=["4 bits", "4 bits in groups", "8 bits"],
)
def test_palettized_networks(which, palettes, at_least, how, folder, inputs, expected, request):
    small = palettized(request.getfixturevalue(which), **how)
    path = folder / f"palettes{palettes}-{how['nbits']}.mlpackage"
    small.save(str(path))
    dense = path.with_name("dense-" + path.name)
    optimize.decompress_weights(small).save(str(dense))
    found = run(path, inputs)["image"]
    np.testing.assert_allclose(found, run(dense, inputs)["image"], rtol=1e-6, atol=1e-6)
    assert at_least < psnr(found, expected, peak=np.ptp(expected)) < 60
    held = summary(path)
    assert (held["palettized_weights"], held["palettes"]) == (2, palettes)


# --- functions, summary and errors ------------------------------------------------------------


def test_functions_share_weights(float32, fp16, inputs, expected, folder):
    path = folder / "functions.mlpackage"
    described = ct.utils.MultiFunctionDescriptor()
    described.add_function(str(fp16), src_function_name="main", target_function_name="small")
    described.add_function(str(fp16), src_function_name="main", target_function_name="large")
    described.default_function_name = "large"
    ct.utils.save_multifunction(described, str(path))
    expected = run(fp16, inputs)["image"]
    for function in (None, "small", "large"):
        np.testing.assert_array_equal(run(path, inputs, function)["image"], expected)
    found, alone = summary(path), summary(fp16)
    assert set(found["functions"]) == {"small", "large"}
    assert found["default_function"] == "large"
    assert (found["weights"], found["weight_bytes"]) == (alone["weights"], alone["weight_bytes"])
    with pytest.raises(UserError, match=r"no function 'smal' \(did you mean 'small'\?\), only"):
        run(path, inputs, "smal")


def test_summary(fp16, monkeypatch, capsys):
    found = summary(fp16)
    main = found["functions"]["main"]
    assert main["inputs"]["x"] == f"fp16 (1, {CHANNELS}, {SIDE}, {SIDE})"
    assert main["outputs"] == {"image": "fp32 (1, 3, 32, 32)"}
    assert main["operations"]["conv"] == 2
    assert main["layout_operations"]["transpose"] == main["operations"]["transpose"] > 0
    assert found["palettes"] == 0
    assert found["bits_per_weight"] == 16
    monkeypatch.setattr("sys.argv", ["mil_interpreter", str(fp16)])
    interpreter.main()
    printed = capsys.readouterr().out
    assert "  input  timestep: fp16 (1)" in printed
    assert "1 conv_transpose" in printed
    assert f"weights: {found['weight_bytes']:,} bytes" in printed


def test_an_index_out_of_range_says_where(folder):
    def build(x):
        table = np.ones((4, 2), np.float32)
        return mb.gather(x=table, indices=mb.cast(x=x, dtype="int32"), axis=0, name="lookup")

    path = save(folder, "gather.mlpackage", build, ct.target.iOS17)
    with pytest.raises(UserError, match=r"'lookup' of type gather: index 5 of an axis of 4"):
        run(path, {"x": np.full((1, 12), 5.0)})


def test_values_that_are_used_up_take_no_memory(folder):
    def build(x):
        for k in range(30):
            x = mb.add(x=x, y=np.float32(k), name=f"sum_{k}")
        return x

    path = save(folder, "chain.mlpackage", build, ct.target.iOS17, shape=(500, 1000))
    interpreter, x = Interpreter(path), np.zeros((500, 1000), np.float32)
    tracemalloc.start()
    try:
        (found,) = interpreter({"x": x}).values()
        assert tracemalloc.get_traced_memory()[1] < 8 * x.nbytes
    finally:
        tracemalloc.stop()
    assert (found == sum(range(30))).all()
