"""Packages written here byte by byte: what is read from them, and what is said of damaged ones."""

import json
import struct

import numpy as np
import pytest

from convert.mil.execution import Interpreter, run
from convert.mil.program import Package
from convert.mil.summary import summary
from convert.mil.weights import TensorType, unpack
from mlx_snapgen.errors import UserError

FP32, INT32, UINT8, STRING = 11, 23, 31, 2
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3, 4)).astype(np.float32)
LUT = np.linspace(-1, 1, 16, dtype=np.float32)
INDICES = RNG.integers(0, 16, (3, 4))
X = RNG.normal(size=(2, 4)).astype(np.float32)


def varint(n):
    n &= (1 << 64) - 1
    return (bytes([n & 0x7F | 0x80]) + varint(n >> 7)) if n > 0x7F else bytes([n])


def message(*fields):
    """(number, value) pairs: whole numbers, texts, or messages as bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
            continue
        value = value.encode() if isinstance(value, str) else value
        out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def kind(dtype, *shape):
    sizes = [(3, message((1, message((1, n))))) for n in shape]
    return message((1, message((1, dtype), (2, len(shape)), *sizes)))


def text(value):
    return message((2, kind(STRING)), (3, message((1, message((4, message((1, value))))))))


def whole_numbers(*values):
    packed = message((1, b"".join(map(varint, values))))
    return message((2, kind(INT32, len(values))), (3, message((1, message((2, packed))))))


def in_file(offset, dtype, *shape):
    blob = message((1, "@model_path/weights/weight.bin"), (2, offset))
    return message((2, kind(dtype, *shape)), (5, blob))


def entry(number, key, value):
    return number, message((1, key), (2, value))


def argument(*bindings):
    """Names, or constants as bytes."""
    parts = [message((1 if isinstance(b, str) else 2, b)) for b in bindings]
    return message(*((1, part) for part in parts))


def operation(op, name, output, inputs=(), attributes=()):
    return message(
        (1, op),
        *(entry(2, key, argument(value)) for key, value in inputs),
        (3, message((1, name), (2, output))),
        entry(5, "name", text(f"{name}_op")),
        *(entry(5, key, value) for key, value in attributes),
    )


def write_package(folder, op="linear"):
    """y = op(x, a weight) and z = the same with a palettized weight, halves swapped."""
    packed = np.packbits(
        ((INDICES.reshape(-1, 1) >> np.arange(4)) & 1).astype(np.uint8), bitorder="little"
    )
    data, places = struct.pack("<II", 3, 2).ljust(64, b"\0"), []
    for number, array in ((2, WEIGHT), (3, packed), (2, LUT)):
        places.append(len(data))
        head = struct.pack("<IIQQ", 0xDEADBEEF, number, array.nbytes, len(data) + 64)
        data += head.ljust(64, b"\0") + array.tobytes()
        data += b"\0" * (-len(data) % 64)
    packed_weight = [
        ("indices", in_file(places[1], UINT8, 6)),
        ("lut", in_file(places[2], FP32, 16)),
        ("shape", whole_numbers(3, 4)),
    ]
    y = kind(FP32, 2, 3)
    operations = [
        operation("const", "w", kind(FP32, 3, 4), (), [("val", in_file(places[0], FP32, 3, 4))]),
        operation("constexpr_lut_to_dense", "p", kind(FP32, 3, 4), (), packed_weight),
        operation(op, "y", y, [("x", "x"), ("weight", "w")]),
        operation("linear", "full", y, [("x", "x"), ("weight", "p")]),
        operation(
            "slice_by_index",
            "z",
            y,
            [
                ("x", "full"),
                ("begin", whole_numbers(-1, 0)),
                ("end", whole_numbers(-3, 3)),
                ("stride", whole_numbers(-1, 1)),
            ],
        ),
    ]
    block = message((2, "y"), (2, "z"), *((3, o) for o in operations))
    function = message(
        (1, message((1, "x"), (2, kind(FP32, 2, 4)))), (2, "CoreML5"), entry(3, "CoreML5", block)
    )
    model = message((1, 7), (2, b""), (502, message((1, 1), entry(2, "main", function))))
    weights = folder / "Data/com.apple.CoreML/weights"
    weights.mkdir(parents=True)
    (weights / "weight.bin").write_bytes(data)
    (weights.parent / "model.mlmodel").write_bytes(model)
    item = {"path": "com.apple.CoreML/model.mlmodel"}
    manifest = {"rootModelIdentifier": "one", "itemInfoEntries": {"one": item}}
    (folder / "Manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def package(tmp_path):
    return write_package(tmp_path / "hand.mlpackage")


def test_it_computes(package):
    found = run(package, {"x": X})
    np.testing.assert_allclose(found["y"], X @ WEIGHT.T, rtol=1e-6)
    np.testing.assert_allclose(found["z"], (X @ LUT[INDICES].T)[::-1], rtol=1e-6)


def test_weights_are_views_of_the_file(package):
    read = Package(package)
    weight = read.read(read.function().operations[0].inputs["val"][0].value)
    assert isinstance(weight.base, np.memmap)
    assert not weight.flags.writeable


def test_summary(package):
    found = summary(package)
    main = found["functions"]["main"]
    assert main["inputs"] == {"x": "fp32 (2, 4)"}
    assert main["outputs"] == {"y": "fp32 (2, 3)", "z": "fp32 (2, 3)"}
    assert main["operations"] == {"linear": 2, "slice_by_index": 1}
    assert (found["palettized_weights"], found["palettes"], found["weights"]) == (1, 1, 24)
    assert found["bits_per_weight"] == pytest.approx((12 * 32 + 12 * 4 + 16 * 32) / 24, abs=1e-3)


@pytest.mark.parametrize(("bits", "values"), [(3, [5, 0, 7, 2, 6, 1]), (6, [63, 1, 32, 40, 7])])
def test_elements_across_bytes(bits, values):
    packed = sum(v << bits * i for i, v in enumerate(values)).to_bytes(4, "little")
    raw = np.frombuffer(packed, np.uint8)
    assert unpack(raw, TensorType(f"uint{bits}", (len(values),))).tolist() == values


def test_signed_elements_of_four_bits():
    found = unpack(np.array([0xF8, 0x17], np.uint8), TensorType("int4", (2, 2)))
    assert found.tolist() == [[-8, -1], [7, 1]]


def test_an_unknown_operation_is_named(tmp_path):
    package = write_package(tmp_path / "new.mlpackage", op="linearly")
    with pytest.raises(
        UserError,
        match=r"function 'main', operation 2 'y_op' of type linearly: .* not supported "
        r"\(did you mean 'linear'\?\): add it to convert/mil/ops.py",
    ):
        Interpreter(package)


def test_an_operation_that_fails_says_where(tmp_path):
    package = write_package(tmp_path / "wrong.mlpackage", op="matmul")
    with pytest.raises(UserError, match=r"operation 2 'y_op' of type matmul: .*weight"):
        run(package, {"x": X})


def test_a_result_of_another_shape_is_an_error(tmp_path):
    package = write_package(tmp_path / "other.mlpackage")
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    wrong, right = kind(FP32, 2, 2), kind(FP32, 2, 3)
    data = model.read_bytes()
    place = data.index(right, data.index(b"linear"))
    model.write_bytes(data[:place] + wrong + data[place + len(right) :])
    with pytest.raises(UserError, match=r"gives \(2, 3\), the program declares fp32 \(2, 2\)"):
        run(package, {"x": X})


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ((2, "z"), (2, "q"), "no operation makes the output 'q'"),
        (entry(2, "x", argument("x")), entry(2, "x", argument("q")), "no value 'q' for .* 'y_op'"),
        (entry(2, "x", argument("x")), entry(2, "x", argument("z")), "no value 'z' for .* 'y_op'"),
        (entry(2, "x", argument("x")), entry(2, "xxxxxx", argument()), "'y_op' lacks a value"),
        ((1, "p"), (1, "w"), "two values of the name 'w'"),
        ((1, "val"), (1, "vax"), "the operation 'w_op' lacks a value"),
        ((1, "weights/weight.bin"), (1, "../../../weight.bi"), "outside of the package"),
    ],
)
def test_wrong_names_are_told(package, good, bad, words):
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    data, good, bad = model.read_bytes(), message(good), message(bad)
    if good[2:].startswith(b"weights"):
        good, bad = good[2:], bad[2:]
    assert good in data and len(good) == len(bad)
    model.write_bytes(data.replace(good, bad, 1))
    with pytest.raises(UserError, match=words):
        run(package, {"x": X})
    if "outside" not in words:
        with pytest.raises(UserError, match=words):
            summary(package)


def test_too_few_bytes_of_a_constant_are_an_error():
    with pytest.raises(ValueError, match="1 bytes for uint4"):
        unpack(np.zeros(1, np.uint8), TensorType("uint4", (1 << 40,)))


@pytest.mark.parametrize("values", ["text", ["a"], {"one": "text"}, {"one": 3}, {"one": {}}])
@pytest.mark.parametrize("name", ["one", 3, 10**30, None])
def test_a_manifest_of_other_values_is_an_error(package, name, values):
    manifest = {"rootModelIdentifier": name, "itemInfoEntries": values}
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"no \.mlpackage"):
        Package(package)


def test_wrong_inputs_are_named(package):
    interpreter = Interpreter(package)
    with pytest.raises(UserError, match=r"no input 'xs' \(did you mean 'x'\?\)"):
        interpreter({"xs": X})
    with pytest.raises(UserError, match=r"lacks its input 'x', fp32 \(2, 4\)"):
        interpreter({})
    with pytest.raises(UserError, match=r"takes x as fp32 \(2, 4\), got \(4, 2\)"):
        interpreter({"x": X.T})
    with pytest.raises(UserError, match=r"no function 'mian' \(did you mean 'main'\?\), only main"):
        Interpreter(package, "mian")


def test_damage_is_told(package, tmp_path):
    with pytest.raises(UserError, match="no package"):
        Package(tmp_path / "absent.mlpackage")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.mlpackage: its Manifest\.json cannot"):
        Package(tmp_path / "empty")
    weights = package / "Data/com.apple.CoreML/weights/weight.bin"
    good = weights.read_bytes()
    weights.write_bytes(good[:64] + b"\0" + good[65:])
    with pytest.raises(UserError, match=r"weights at byte 64 of .*weight.bin are damaged"):
        run(package, {"x": X})
    weights.write_bytes(good[:68] + b"\1" + good[69:])
    with pytest.raises(UserError, match=r"are 48 bytes of fp16, the program expects fp32 \(3, 4\)"):
        run(package, {"x": X})
    weights.write_bytes(good[:4] + b"\3" + good[5:])
    with pytest.raises(UserError, match="storage format 3"):
        run(package, {"x": X})
    weights.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        run(package, {"x": X})
    model = package / "Data/com.apple.CoreML/model.mlmodel"
    model.write_bytes(model.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        Package(package)
    model.write_bytes(message((1, 4)))
    with pytest.raises(UserError, match="no ML Program"):
        Package(package)
