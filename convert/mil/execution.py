"""Run a Core ML package in numpy, on any machine.

`run` computes a function once and `Interpreter` many times. Both execute the saved program with the
saved weights, without macOS, Core ML or coremltools, to verify that an export is correct. The
Neural Engine accumulates in other ways, which this does not reproduce.

Every operation computes in float32; its result is rounded to the type that the program declares, as
a package in fp16 stores it between operations. With `keep_float32` nothing is rounded to fp16,
which separates rounding in the program from rounding of its weights.

A picture among inputs or outputs is the tensor of the program, (1, 3, H, W).
"""

from pathlib import Path
from typing import Any

import numpy as np

from convert.mil.ops import OPS, Norms
from convert.mil.program import Function, Literal, Operation, Package
from convert.mil.weights import TensorType
from mlx_snapgen.errors import UserError, nearest

TUPLES = {"concat": "values", "einsum": "values", "stack": "values"}
"""Operation -> its parameter with several values."""

DAMAGE = (UserError, ValueError, TypeError, LookupError)
DAMAGE += (AttributeError, ArithmeticError, MemoryError)
"""What operations raise for arguments of wrong types, shapes or sizes."""


class Interpreter:
    """One function of a package, ready to run. Weights stay in their memory-mapped file.

    Args:
        package: folder of the package.
        function: None takes the package's default one, usually "main".
        keep_float32: do not round to fp16 between operations.
        keep_weights: cache decompressed weights between runs, in the type of the program. False
            decompresses them at every use, for large models.
        norms: how the means of an fp16 program are computed: "float32", "fp16 squares" (squares
            are rounded to fp16, the sums are not) or "fp16 sums" (sums are rounded too). What is
            over fp16's range is infinite.

    Raises:
        UserError: a package that cannot be read, no such function, or an unknown operation.
    """

    inputs: dict[str, TensorType]
    outputs: dict[str, TensorType]

    def __init__(
        self,
        package: str | Path | Package,
        function: str | None = None,
        keep_float32: bool = False,
        keep_weights: bool = True,
        norms: Norms = "float32",
    ):
        self.package = package if isinstance(package, Package) else Package(package)
        self.function_name = self.package.default_function if function is None else function
        self._function = self.package.function(function)
        self._keep_float32, self._keep_weights = keep_float32, keep_weights
        self._norms: Norms = norms
        for i, operation in enumerate(self._function.operations):
            if operation.type != "const" and operation.type not in OPS:
                raise UserError(
                    f"{self._where(i, operation)}: this operation is not supported"
                    f"{nearest(operation.type, OPS)}: add it to convert/mil/ops.py"
                )
        types = self._function.types()
        self.inputs = self._function.inputs
        self.outputs = {name: types[name] for name in self._function.outputs}
        self._constants = {
            name: (i, operation)
            for i, operation in enumerate(self._function.operations)
            if operation.is_constant
            for name in operation.outputs
        }
        self._weights: dict[str, Any] = {}
        self._last_use = _last_use(self._function)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs by name -> outputs by name, of the types that the function declares.

        Raises:
            UserError: an input that is missing, unknown or misshapen, or an operation that fails.
        """
        values = self._checked(inputs)
        for i, operation in enumerate(self._function.operations):
            if not operation.is_constant:
                values |= self._compute(i, operation, values)
            for name in self._last_use.get(i, ()):
                values.pop(name, None)
        return {name: self._value(name, values) for name in self._function.outputs}

    def _checked(self, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
        for name in inputs:
            if name not in self.inputs:
                hint = nearest(name, self.inputs)
                raise UserError(f"{self._place} has no input '{name}'{hint}")
        values = {}
        for name, kind in self.inputs.items():
            if name not in inputs:
                raise UserError(f"{self._place} lacks its input '{name}', {kind}")
            value = np.asarray(inputs[name])
            if not _fits(value, kind):
                raise UserError(f"{self._place} takes {name} as {kind}, got {value.shape}")
            values[name] = self._rounded(value, kind)
        return values

    @property
    def _place(self) -> str:
        return f"{self.package.path}, function '{self.function_name}'"

    def _where(self, index: int, operation: Operation) -> str:
        return f"{self._place}, operation {index} '{operation.name}' of type {operation.type}"

    def _rounded(self, value: Any, kind: TensorType) -> Any:
        if kind.dtype == "string":
            return value
        dtype = np.float32 if self._keep_float32 and kind.dtype == "fp16" else kind.numpy
        return np.asarray(value).astype(dtype, copy=False)

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        """A value of the program; constants and weights are read at their first use."""
        if name in values:
            return values[name]
        if name in self._weights:
            return self._weights[name]
        index, operation = self._constants[name]
        if operation.type == "const":
            (binding,) = operation.inputs["val"]
            assert isinstance(binding, Literal)
            return self.package.read(binding.value)
        value = self._compute(index, operation, {})[name]
        if self._keep_weights:
            self._weights[name] = value
        return value

    def _argument(self, binding: str | Literal, values: dict[str, Any]) -> Any:
        if isinstance(binding, Literal):
            value = self.package.read(binding.value)
        else:
            value = self._value(binding, values)
        if isinstance(value, np.ndarray) and value.dtype == np.float16:
            return value.astype(np.float32)
        return value

    def _compute(self, index: int, operation: Operation, values: dict[str, Any]) -> dict[str, Any]:
        several = TUPLES.get(operation.type)
        arguments = {}
        for parameter, bindings in operation.inputs.items():
            found = [self._argument(binding, values) for binding in bindings]
            arguments[parameter] = found if parameter == several else found[0]
        try:
            with np.errstate(
                all="ignore"
            ):  # the program itself may have masks of -inf and overflow in fp16
                if operation.type in ("layer_norm", "reduce_mean"):
                    (kind,) = operation.outputs.values()
                    arguments["norms"] = self._norms if kind.dtype == "fp16" else "float32"
                made = OPS[operation.type](**arguments)
                made = made if isinstance(made, list) else [made]
                rounded = {
                    name: self._rounded(value, kind)
                    for value, (name, kind) in zip(made, operation.outputs.items(), strict=True)
                }
        except DAMAGE as error:
            raise UserError(f"{self._where(index, operation)}: {error}") from error
        for name, kind in operation.outputs.items():
            if not _fits(rounded[name], kind):
                raise UserError(
                    f"{self._where(index, operation)} gives {rounded[name].shape}, the program "
                    f"declares {kind}"
                )
        return rounded


def run(
    package_path: str | Path,
    inputs: dict[str, np.ndarray],
    function: str | None = None,
    keep_float32: bool = False,
) -> dict[str, np.ndarray]:
    """Compute one function of a package once (see `Interpreter`)."""
    return Interpreter(package_path, function, keep_float32, keep_weights=False)(inputs)


def _fits(value: Any, kind: TensorType) -> bool:
    if kind.dtype == "string":
        return True
    return len(value.shape) == len(kind.shape) and all(
        m is None or n == m for n, m in zip(value.shape, kind.shape, strict=True)
    )


def _last_use(function: Function) -> dict[int, list[str]]:
    """Index of an operation -> values that no later operation reads."""
    last = {}
    for i, operation in enumerate(function.operations):
        used = [b for bindings in operation.inputs.values() for b in bindings]
        for name in [*(b for b in used if isinstance(b, str)), *operation.outputs]:
            last[name] = i
    ends: dict[int, list[str]] = {}
    for name, i in last.items():
        if name not in function.outputs:
            ends.setdefault(i, []).append(name)
    return ends
