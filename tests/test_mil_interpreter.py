"""Converted networks through the interpreter against torch, and what it makes of faulty ones."""

import shutil

import numpy as np
import pytest

from convert import mil_interpreter
from convert.mil_interpreter import Interpreter, run, summary
from convert.mil_program import Blob, Package
from mlx_snapgen.errors import UserError

WHY = "writing Core ML packages needs coremltools and torch: pip install '.[coreml]' torch"
ct = pytest.importorskip("coremltools", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
mil = pytest.importorskip("coremltools.converters.mil", reason=WHY)
optimize = pytest.importorskip("coremltools.optimize.coreml", reason=WHY)
F = torch.nn.functional
mb = mil.Builder
types = mil.mil.types

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
    return Block().eval().requires_grad_(False)


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


@pytest.fixture(scope="module")
def float32(block, inputs, folder):
    path = folder / "float32.mlpackage"
    convert(block, inputs, ct.precision.FLOAT32, ct.target.iOS16).save(str(path))
    return path


@pytest.fixture(scope="module")
def fp16_model(block, inputs):
    return convert(block, inputs, ct.precision.FLOAT16, ct.target.iOS18)


@pytest.fixture(scope="module")
def fp16(fp16_model, folder):
    path = folder / "fp16.mlpackage"
    fp16_model.save(str(path))
    return path


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def psnr(found, expected):
    return 20 * np.log10(np.ptp(expected) / np.sqrt(np.mean((found - expected) ** 2)))


def test_float32_equals_torch(float32, inputs, expected):
    found = run(float32, inputs)["image"]
    assert found.shape == expected.shape == (1, 3, 32, 32)
    assert relative_error(found, expected) < 1e-5


def test_fp16_is_near_torch(fp16, inputs, expected):
    rounded, kept = (run(fp16, inputs, keep_float32=k)["image"] for k in (False, True))
    assert 60 < psnr(rounded, expected) < 100
    # What is left is the rounding of the weights.
    assert psnr(kept, expected) > psnr(rounded, expected) + 3


def test_runs_repeat(fp16, inputs):
    interpreter = Interpreter(fp16, keep_weights=True)
    first, second = interpreter(inputs), interpreter(inputs)
    np.testing.assert_array_equal(first["image"], second["image"])
    assert str(interpreter.inputs["timestep"]) == "fp32 (1)"
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
    assert relative_error(
        run(scaled(float32, folder, shape, factor), inputs)["image"], expected
    ) > (1e-4)
    assert psnr(run(scaled(fp16, folder, shape, factor), inputs)["image"], expected) < 58


# --- compressed weights -----------------------------------------------------------------------


def saved(folder, name, build, target, **inputs):
    specs = [mb.TensorSpec(shape=v.shape, dtype=types.fp32) for v in inputs.values()]
    program = mb.program(input_specs=specs, opset_version=target)(build)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=target,
        skip_model_load=True,
    )
    model.save(str(folder / name))
    return folder / name


def blocks(x, shape):
    """Every element of x over its block of a tensor of `shape`."""
    places = np.indices(shape)
    sizes = [n // m for n, m in zip(shape, x.shape, strict=True)]
    return x[tuple(p // s for p, s in zip(places, sizes, strict=True))]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_palettes_of_every_width(bits, folder):
    rng = np.random.default_rng(bits)
    x = rng.normal(size=(1, 12)).astype(np.float32)
    indices = rng.integers(0, 2**bits, (6, 12))
    lut = rng.normal(size=(3, 2, 2**bits, 1)).astype(np.float32)
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))

    def build(x):
        weight = mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=lut)
        return mb.linear(x=x, weight=weight, name="y")

    path = saved(folder, f"lut{bits}.mlpackage", build, ct.target.iOS18, x=x)
    rows, columns = np.indices(indices.shape)
    weight = lut[rows // 2, columns // 6, indices, 0]
    np.testing.assert_allclose(run(path, {"x": x})["y"], x @ weight.T, rtol=1e-5, atol=1e-5)
    found = summary(path)
    assert found["palettized_weights"] == 1 and found["palettes"] == 6
    # 72 indices and six palettes of float32.
    stored = -(-72 * bits // 8) * 8 + 6 * 2**bits * 32
    assert found["bits_per_weight"] == pytest.approx(stored / 72, abs=0.02)


def test_palettes_of_vectors(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 12)).astype(np.float32)
    indices = rng.integers(0, 4, (3, 12)).astype(types.nptype_from_builtin(types.uint2))
    lut = rng.normal(size=(1, 3, 4, 2)).astype(np.float32)

    def build(x):
        weight = mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=0)
        return mb.linear(x=x, weight=weight, name="y")

    path = saved(folder, "vectors.mlpackage", build, ct.target.iOS18, x=x)
    weight = [[lut[0, j // 4, int(indices[i // 2, j]), i % 2] for j in range(12)] for i in range(6)]
    found = run(path, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ np.array(weight).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
def test_scales_by_block(dtype, folder):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 12)).astype(np.float32)
    kind = types.nptype_from_builtin(types.string_to_builtin(dtype))
    low, high = (0, 16) if dtype == "uint4" else (-8, 8) if dtype == "int4" else (0, 100)
    data, offset = rng.integers(low, high, (6, 12)), rng.integers(low, high, (6, 3))
    scale = rng.normal(size=(6, 3)).astype(np.float32)

    def build(x):
        weight = mb.constexpr_blockwise_shift_scale(
            data=data.astype(kind), scale=scale, offset=offset.astype(kind)
        )
        return mb.linear(x=x, weight=weight, name="y")

    path = saved(folder, f"{dtype}.mlpackage", build, ct.target.iOS18, x=x)
    weight = (data - blocks(offset, data.shape)) * blocks(scale, data.shape)
    found = run(path, {"x": x})["y"]
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_affine_weights_and_casts(folder):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 12)).astype(np.float32)
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

    path = saved(folder, "affine.mlpackage", build, ct.target.iOS16, x=x)
    weight = (data.astype(np.float32) - zero[:, None]) * scale[:, None]
    found = run(path, {"x": x})["y"]
    np.testing.assert_allclose(found, (x + bias) @ weight.T, rtol=1e-4, atol=1e-3)


def palettized(model, **how):
    how = optimize.OpPalettizerConfig(mode="kmeans", weight_threshold=500, **how)
    config = optimize.OptimizationConfig(op_type_configs={"conv": how})
    return optimize.palettize_weights(model, config)


@pytest.mark.parametrize(
    "how",
    [
        {"nbits": 4},
        {"nbits": 8},
        {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 8},
    ],
    ids=["4 bits", "8 bits", "4 bits in groups"],
)
def test_palettized_networks(how, fp16_model, folder, inputs, expected):
    name = "-".join(str(v) for v in how.values())
    small = palettized(fp16_model, **how)
    small.save(str(folder / f"{name}.mlpackage"))
    optimize.decompress_weights(small).save(str(folder / f"{name}-dense.mlpackage"))
    found = run(folder / f"{name}.mlpackage", inputs)["image"]
    dense = run(folder / f"{name}-dense.mlpackage", inputs)["image"]
    np.testing.assert_array_equal(found, dense)
    assert 15 + 20 * (how["nbits"] == 8) < psnr(found, expected)
    held = summary(folder / f"{name}.mlpackage")
    assert held["palettized_weights"] == 2
    groups = (3 * CHANNELS + CHANNELS) // how["group_size"] if "group_size" in how else 2
    assert held["palettes"] == groups


def test_palettes_of_ios16(block, inputs, expected, folder):
    model = convert(block, inputs, ct.precision.FLOAT16, ct.target.iOS16)
    palettized(model, nbits=6).save(str(folder / "ios16.mlpackage"))
    assert psnr(run(folder / "ios16.mlpackage", inputs)["image"], expected) > 25
    assert summary(folder / "ios16.mlpackage")["palettes"] == 2


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
    assert main["inputs"]["x"] == f"fp32 (1, {CHANNELS}, {SIDE}, {SIDE})"
    assert main["outputs"] == {"image": "fp32 (1, 3, 32, 32)"}
    assert main["operations"]["conv"] == 2
    assert main["layout_operations"]["transpose"] == main["operations"]["transpose"] > 0
    assert found["palettes"] == 0
    assert found["bits_per_weight"] == 16
    monkeypatch.setattr("sys.argv", ["mil_interpreter", str(fp16)])
    mil_interpreter.main()
    printed = capsys.readouterr().out
    assert "  input  timestep: fp32 (1)" in printed
    assert "1 conv_transpose" in printed
    assert f"weights: {found['weight_bytes']:,} bytes" in printed


def test_an_unknown_operation_is_named(folder):
    x = np.zeros((2, 3), np.float32)

    def build(x):
        return mb.sinh(x=mb.relu(x=x), name="strange")

    path = saved(folder, "unknown.mlpackage", build, ct.target.iOS16, x=x)
    with pytest.raises(UserError, match=r"operation \d 'strange' of type sinh: this operation is"):
        Interpreter(path)


def test_an_index_out_of_range_says_where(folder):
    x = np.array([[0.0, 5.0]], np.float32)

    def build(x):
        table = np.ones((4, 2), np.float32)
        return mb.gather(x=table, indices=mb.cast(x=x, dtype="int32"), axis=0, name="lookup")

    path = saved(folder, "gather.mlpackage", build, ct.target.iOS17, x=x)
    with pytest.raises(UserError, match=r"'lookup' of type gather: index 5 of an axis of 4"):
        run(path, {"x": x})


def test_wrong_inputs_are_named(fp16, inputs):
    interpreter = Interpreter(fp16)
    with pytest.raises(UserError, match=r"no input 'timestp' \(did you mean 'timestep'\?\)"):
        interpreter({"x": inputs["x"], "timestp": inputs["timestep"]})
    with pytest.raises(UserError, match=r"lacks its input 'timestep', fp32 \(1\)"):
        interpreter({"x": inputs["x"]})
    with pytest.raises(UserError, match=r"takes timestep as fp32 \(1\), got \(2,\)"):
        interpreter(inputs | {"timestep": np.zeros(2)})
