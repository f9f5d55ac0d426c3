"""Read a Core ML package (.mlpackage, an ML Program) without Core ML and without coremltools.

The package is a folder: Manifest.json names the model file among its items, by default
Data/com.apple.CoreML/model.mlmodel, beside which is weights/weight.bin (see `convert.mil.weights`).
The model file is a protobuf message, `Model` of coremltools' mlmodel/format/Model.proto with the
program as mlmodel/format/MIL.proto describes it. The few fields that matter are read from the wire
format here, so that the check of an export shares no code with the exporter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.mil.weights import DTYPES, Blob, TensorType, WeightFile, unpack
from mlx_snapgen.errors import UserError, nearest
from mlx_snapgen.reading import read_bytes, read_object

Constant = np.ndarray | str | list | Blob


class Literal(NamedTuple):
    """A constant that is written where it is used, as opposed to the name of a value."""

    value: Constant


@dataclass
class Operation:
    """One operation, its attributes among its inputs.

    `inputs` has a list for each parameter, of one value unless the parameter takes a tuple: names
    of other operations' outputs, or literals. `outputs` are in order.
    """

    type: str
    name: str
    inputs: dict[str, list[str | Literal]]
    outputs: dict[str, TensorType]

    @property
    def is_constant(self) -> bool:
        """Whether its outputs are constants or decompressed weights."""
        return self.type == "const" or self.type.startswith("constexpr_")


@dataclass
class Function:
    """One function: its inputs by name, operations in order of computation, names of outputs."""

    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    opset: str = ""

    def types(self) -> dict[str, TensorType]:
        """Types of all values."""
        made = {name: kind for op in self.operations for name, kind in op.outputs.items()}
        return self.inputs | made


# --- protobuf's wire format -------------------------------------------------------------------


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def wire_fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: integers or bytes. `ValueError` for damaged data."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, at = _varint(data, at)
            value = data[at : at + length]
            if len(value) != length:
                raise ValueError("a message ends too early")
            at += length
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, value


class _Message:
    """A message's fields by number, in order."""

    def __init__(self, data: bytes | memoryview = b""):
        self._fields: dict[int, list[Any]] = {}
        for number, value in wire_fields(memoryview(data)):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[Any]:
        return self._fields.get(number, [])

    def has(self, number: int) -> bool:
        return number in self._fields

    def message(self, number: int) -> "_Message":
        return _Message(self._bytes(number)) if self.has(number) else _Message()

    def _bytes(self, number: int) -> Any:
        value = self._fields[number][-1]
        if isinstance(value, int):
            raise ValueError(f"field {number} is a number, not a message")
        return value

    def messages(self, number: int) -> list["_Message"]:
        return [_Message(value) for value in self.all(number)]

    def number(self, number: int) -> int:
        return self._fields[number][-1] if self.has(number) else 0

    def text(self, number: int) -> str:
        return bytes(self._bytes(number)).decode() if self.has(number) else ""

    def entries(self, number: int) -> dict[str, "_Message"]:
        """A map from strings to messages."""
        return {entry.text(1): entry.message(2) for entry in self.messages(number)}


def _varints(values: list[Any]) -> list[int]:
    """Repeated whole numbers, packed or not, as two's complement of 64 bits."""
    found = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            found.append(number)
    return [n - (1 << 64) if n >= 1 << 63 else n for n in found]


# --- the program ------------------------------------------------------------------------------


def _type(message: _Message) -> TensorType:
    """A ValueType that is a tensor; a list or tuple of values has its element's type."""
    if message.has(2):
        return _type(message.message(2).message(1))
    if not message.has(1):
        raise UserError("the program has a value that is no tensor (a state or dictionary)")
    tensor = message.message(1)
    number = tensor.number(1)
    if number not in DTYPES:
        raise UserError(f"the program has a value of MIL's data type {number}, not supported")
    sizes = [d.message(1).number(1) if d.has(1) else None for d in tensor.messages(3)]
    return TensorType(DTYPES[number][0], tuple(sizes))


def _constant(message: _Message) -> Constant:
    """A Value: from the program itself, or its position in the weight file."""
    if message.has(5):
        blob = message.message(5)
        return Blob(blob.text(1), blob.number(2), _type(message.message(2)))
    immediate = message.message(3)
    if immediate.has(3):
        return [_constant(value) for value in immediate.message(3).messages(1)]
    kind = _type(message.message(2))
    tensor = immediate.message(1)
    if tensor.has(4):
        texts = [bytes(text).decode() for text in tensor.message(4).all(1)]
        return texts[0] if not kind.shape else texts
    shape = tuple(n or 0 for n in kind.shape)
    for number, floating in ((1, np.float32), (6, np.float64)):
        if tensor.has(number):
            raw = b"".join(bytes(v) for v in tensor.message(number).all(1))
            return np.frombuffer(raw, floating).astype(kind.numpy).reshape(shape)
    if tensor.has(7):
        raw = b"".join(bytes(v) for v in tensor.message(7).all(1))
        return unpack(np.frombuffer(raw, np.uint8), kind)
    numbers = [n for field in (2, 3, 5) for n in _varints(tensor.message(field).all(1))]
    return np.array(numbers, np.int64).astype(kind.numpy).reshape(shape)


def _operation(message: _Message) -> Operation:
    inputs: dict[str, list[Any]] = {}
    for parameter, argument in message.entries(2).items():
        inputs[parameter] = [
            binding.text(1) if binding.has(1) else Literal(_constant(binding.message(2)))
            for binding in argument.messages(1)
        ]
    # `const` and the older constexpr operations have their data as attributes.
    attributes = {key: _constant(value) for key, value in message.entries(5).items()}
    name = attributes.pop("name", "")
    inputs |= {key: [Literal(value)] for key, value in attributes.items()}
    outputs = {o.text(1): _type(o.message(2)) for o in message.messages(3)}
    name = name if isinstance(name, str) and name else next(iter(outputs), "")
    return Operation(message.text(1), name, inputs, outputs)


def _function(message: _Message) -> Function:
    opset = message.text(2)
    blocks = message.entries(3)
    if opset not in blocks:
        raise ValueError(f"no block for {opset}")
    block = blocks[opset]
    function = Function(
        {i.text(1): _type(i.message(2)) for i in message.messages(1)},
        [bytes(name).decode() for name in block.all(2)],
        [_operation(m) for m in block.messages(3)],
        opset,
    )
    _check_names(function)
    return function


def _check_names(function: Function) -> None:
    """`ValueError` for a value that is read before an operation makes it, or made twice."""
    made, constant = set(function.inputs), set[str]()
    for operation in function.operations:
        known = constant if operation.is_constant else made
        read = [b for bindings in operation.inputs.values() for b in bindings]
        unknown = [b for b in read if isinstance(b, str) and b not in known]
        if operation.type == "const":
            is_complete = [type(b) for b in operation.inputs.get("val", ())] == [Literal]
        else:
            is_complete = all(operation.inputs.values())
        if not is_complete:
            raise ValueError(f"the operation '{operation.name}' lacks a value")
        if unknown:
            raise ValueError(f"no value '{unknown[0]}' for the operation '{operation.name}'")
        if twice := made & operation.outputs.keys():
            raise ValueError(f"two values of the name '{min(twice)}'")
        made |= operation.outputs.keys()
        if operation.is_constant:
            constant |= operation.outputs.keys()
    if absent := [name for name in function.outputs if name not in made]:
        raise ValueError(f"no operation makes the output '{absent[0]}'")


class Package:
    """An .mlpackage with an ML Program.

    Raises:
        UserError: no such package, a damaged one, or one that holds something else.
    """

    functions: dict[str, Function]
    default_function: str
    specification_version: int

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.model_file = _model_file(self.path)
        self._files: dict[str, WeightFile] = {}
        try:
            model = _Message(memoryview(read_bytes(self.model_file, most=2**31)))
            if not model.has(502):
                raise UserError(
                    f"{self.path} is no ML Program: convert with convert_to='mlprogram'"
                )
            program = model.message(502)
            self.specification_version = model.number(1)
            self.default_function = model.message(2).text(21) or "main"
            self.functions = {n: _function(m) for n, m in program.entries(2).items()}
        except UserError:
            raise
        except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.model_file} is damaged ({error!r}): export it again") from None

    def function(self, name: str | None = None) -> Function:
        """The named function, or the default one; `UserError` if there is none."""
        name = self.default_function if name is None else name
        if name not in self.functions:
            known = ", ".join(self.functions)
            hint = nearest(name, self.functions)
            raise UserError(f"{self.path} has no function '{name}'{hint}, only {known}")
        return self.functions[name]

    def weight_bytes(self) -> int:
        """Size of the weight files."""
        folder = self.model_file.parent / "weights"
        return sum(p.stat().st_size for p in folder.glob("*") if p.is_file())

    def read(self, constant: Constant) -> np.ndarray | str | list:
        """A constant's value; one from the weight file is a view of it (see `WeightFile.read`)."""
        if isinstance(constant, list):
            return [self.read(value) for value in constant]
        if not isinstance(constant, Blob):
            return constant
        if constant.file not in self._files:
            path = self.model_file.parent / constant.file.removeprefix("@model_path/")
            if ".." in path.parts or not path.is_relative_to(self.model_file.parent):
                raise UserError(f"{self.model_file} reads {path}, which is outside of the package")
            self._files[constant.file] = WeightFile(path)
        return self._files[constant.file].read(constant)


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"no package {path}")
    try:
        manifest = read_object(path / "Manifest.json")
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        found = path / "Data" / item["path"]
        if ".." in found.parts or not found.is_relative_to(path):
            raise ValueError(f"{item['path']} is outside of the package")
        return found
    except (UserError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is no .mlpackage: its Manifest.json cannot be read ({error!r})"
        ) from None
