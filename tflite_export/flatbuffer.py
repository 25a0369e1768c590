"""Read a `.tflite` file in a checked way: operators, tensors, signatures. Needs no TensorFlow.

The generated schema code trusts every offset and every length it finds. Here each vector is charged against a budget
that an honest file cannot exceed before it is walked, and each index is checked, so that a truncated or hostile file
gives a `FlatbufferError`: no crash, no endless loop, no huge allocation.
"""

import functools
import hashlib
import inspect
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tflite_export.errors import FlatbufferError

_IDENTIFIER = b"TFL3"
_CUSTOM = 32  # BuiltinOperator.CUSTOM
# What the generated code and struct raise on offsets that lead nowhere.
_MALFORMED = (struct.error, TypeError, ValueError, IndexError, OverflowError)
# An honest file reads each of its bytes about once; tools that share names or shapes between tensors a few times.
_READS_PER_BYTE = 4
_TABLE_BYTES = 16  # charged for a table: its entry in the vector, its offset to the vtable, two fields
_MAX_DIMENSIONS = 16  # the runtime takes 8 at most
_ITEM_BITS = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float64": 64,
    "int4": 4,
    "int8": 8,
    "int16": 16,
    "int32": 32,
    "int64": 64,
    "uint8": 8,
    "uint16": 16,
    "uint32": 32,
    "uint64": 64,
    "bool": 8,
}
# Options of operators that are numbers in the file and names in the schema.
_OPTION_ENUMS = {
    "fused_activation_function": "ActivationFunctionType",
    "padding": "Padding",
    "weights_format": "FullyConnectedOptionsWeightsFormat",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a subgraph.

    `scales` and `zero_points` are empty where the tensor is not quantized, hold one value each where it is quantized
    as a whole, and one value per index of `axis` where per channel: real = scale * (stored - zero_point).
    `data` is where in the file the bytes of a constant stand: (first, one past the last); see `read_constant`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: bool
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int | None = None
    data: tuple[int, int] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator: its name (the custom code where `custom`), version, and the indices of its tensors.

    An optional input that is left out has the index -1. `options` are the scalar ones of the schema, in snake case:
    numbers, and names of activation functions, paddings and weight formats; empty where the operator has none.
    """

    name: str
    version: int
    custom: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Subgraph:
    """Tensors, operators in execution order, and the indices of the tensors that go in and out."""

    name: str
    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """A named entry: the model's own names of inputs and outputs, each with its tensor index."""

    name: str
    subgraph: int
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TfliteModel:
    """What a `.tflite` file holds, without its weights. `source` is what errors and tables call it."""

    source: str
    size_bytes: int
    sha256: str
    subgraphs: tuple[Subgraph, ...]
    signatures: tuple[Signature, ...]

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The operators of all subgraphs."""
        return tuple(operator for subgraph in self.subgraphs for operator in subgraph.operators)

    @property
    def operator_counts(self) -> dict[str, int]:
        """How often each operator occurs, by name."""
        return dict(sorted(Counter(operator.name for operator in self.operators).items()))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of all subgraphs."""
        return tuple(tensor for subgraph in self.subgraphs for tensor in subgraph.tensors)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that go into the main subgraph, in the file's order."""
        return tuple(self.subgraphs[0].tensors[i] for i in self.subgraphs[0].inputs)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that come out of the main subgraph, in the file's order."""
        return tuple(self.subgraphs[0].tensors[i] for i in self.subgraphs[0].outputs)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of `inputs`: those of the first signature, or of the tensors where the file has none."""
        return self._names("inputs")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of `outputs`: those of the first signature, or of the tensors where the file has none."""
        return self._names("outputs")

    def _names(self, side: str) -> tuple[str, ...]:
        main = self.subgraphs[0]
        names: dict[int, str] = {}
        for signature in self.signatures:
            if signature.subgraph == 0:
                names |= {index: name for name, index in getattr(signature, side) if index not in names}
        return tuple(names.get(index, main.tensors[index].name) for index in getattr(main, side))

    @property
    def float_tensors(self) -> tuple[str, ...]:
        """Names of the float32 tensors."""
        return tuple(tensor.name for tensor in self.tensors if tensor.dtype == "float32")

    @property
    def custom_operators(self) -> tuple[str, ...]:
        """Names of the operators that the plain runtime does not know, each once."""
        return tuple(sorted({operator.name for operator in self.operators if operator.custom}))

    @property
    def select_operators(self) -> tuple[str, ...]:
        """Names of the operators that need TensorFlow inside the runtime (select TF operators), each once."""
        return tuple(name for name in self.custom_operators if name.startswith("Flex"))


def read_flatbuffer(source: str | Path | bytes, *, name: str | None = None) -> TfliteModel:
    """Read and check a `.tflite` file.

    Args:
        source: path of the file, or its bytes.
        name: what errors and tables call it where `source` is bytes.

    Raises:
        FlatbufferError: the file cannot be read, is no `.tflite` file, is cut short, or contradicts itself.
    """
    given = name if isinstance(source, bytes) else str(source)
    label = "these bytes" if given is None else f"'{given}'"
    data = source if isinstance(source, bytes) else read_bytes(Path(source))
    if len(data) < 8 or data[4:8] != _IDENTIFIER:
        raise FlatbufferError(f"{label} is no .tflite file: the identifier 'TFL3' is missing at byte 4.")
    try:
        subgraphs, signatures = _Reader(data).read()
    except FlatbufferError as error:
        raise FlatbufferError(f"{label} is a damaged .tflite file: {error}. Make or copy it again.") from error
    except _MALFORMED as error:
        raise FlatbufferError(
            f"{label} is a damaged .tflite file: an offset in it leads nowhere ({error}). Make or copy it again."
        ) from error
    return TfliteModel(
        source="<bytes>" if given is None else given,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        subgraphs=subgraphs,
        signatures=signatures,
    )


def read_constant(data: bytes, tensor: Tensor) -> np.ndarray:
    """Return the stored values of a constant, of the tensor's shape.

    Args:
        data: the bytes of the file that `tensor` was read from.
        tensor: a constant of whole bytes (no 4-bit one).

    Raises:
        FlatbufferError: it is no such constant.
    """
    if tensor.data is None or _ITEM_BITS.get(tensor.dtype, 4) < 8 or tensor.dtype == "bfloat16":
        raise FlatbufferError(f"tensor '{_short(tensor.name)}' of type {tensor.dtype} holds no constant to read.")
    values = np.frombuffer(data[slice(*tensor.data)], tensor.dtype)
    size = math.prod(tensor.shape)
    if values.size < size:
        raise FlatbufferError(f"tensor '{_short(tensor.name)}' of shape {tensor.shape} is stored sparse.")
    return values[:size].reshape(tensor.shape)


def read_bytes(path: Path) -> bytes:
    """Return what a file holds.

    Raises:
        FlatbufferError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise FlatbufferError(f"cannot read '{path}': {error.strerror or error}.") from error


def _short(name: str) -> str:
    # A damaged name can be as long as the file.
    return name if len(name) <= 80 else f"{name[:80]}..."


@functools.cache
def _schema() -> Any:
    # 20,000 generated lines: not worth loading for those who only catch errors.
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


@functools.cache
def _enum_names(enum: str) -> dict[int, str]:
    return {value: name for name, value in vars(getattr(_schema(), enum)).items() if isinstance(value, int)}


@functools.cache
def _option_names(options: str) -> tuple[tuple[str, str], ...]:
    """Return (accessor, name in snake case) of the scalar options in a class of the schema."""
    methods = [name for name, value in vars(getattr(_schema(), options)).items() if inspect.isfunction(value)]
    vectors = {name.removesuffix("Length") for name in methods if name.endswith("Length")}
    accessors = [
        name for name in methods if name != "Init" and not any(name == v or name.startswith(f"{v}As") for v in vectors)
    ]
    scalars = [name for name in accessors if not name.endswith(("Length", "IsNone"))]
    return tuple(
        (name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()) for name in scalars
    )


@dataclass(frozen=True)
class _Buffer:
    start: int
    size: int
    constant: bool


class _Reader:
    """One pass over the bytes of one file, with the budget that bounds it."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        self._budget = _READS_PER_BYTE * len(data)

    def read(self) -> tuple[tuple[Subgraph, ...], tuple[Signature, ...]]:
        root = _schema().Model.GetRootAs(self._data, 0)
        if not 0 < root._tab.Pos < len(self._data):
            raise FlatbufferError("the root lies outside the file")
        codes = [self._operator_code(code) for code in self._tables(root, "OperatorCodes")]
        buffers = [self._buffer(buffer) for buffer in self._tables(root, "Buffers")]
        subgraphs = tuple(self._subgraph(table, codes, buffers) for table in self._tables(root, "Subgraphs"))
        if not subgraphs:
            raise FlatbufferError("it holds no subgraph")
        signatures = tuple(self._signature(table, subgraphs) for table in self._tables(root, "SignatureDefs"))
        return subgraphs, signatures

    def _charge(self, n_bytes: int) -> None:
        self._budget -= n_bytes
        if self._budget < 0:
            raise FlatbufferError("its vectors claim more data than the file has")

    def _tables(self, table: Any, field: str) -> Iterator[Any]:
        length = getattr(table, f"{field}Length")()
        self._charge(_TABLE_BYTES * length)
        item: Callable[[int], Any] = getattr(table, field)
        return (item(i) for i in range(length))

    def _numbers(self, table: Any, field: str) -> np.ndarray:
        """The vector of numbers `field`, of shape (n,); empty where it is absent."""
        self._charge(4 * getattr(table, f"{field}Length")())
        values = getattr(table, f"{field}AsNumpy")()
        return np.empty(0, np.int32) if isinstance(values, int) else values

    def _text(self, value: bytes | None) -> str:
        self._charge(len(value or b""))
        return (value or b"").decode("utf-8")

    def _operator_code(self, code: Any) -> tuple[str, int, bool]:
        # Codes up to 127 stand in both fields, newer ones in the second only, old files have the first only.
        number = max(code.DeprecatedBuiltinCode(), code.BuiltinCode())
        if number == _CUSTOM:
            return self._text(code.CustomCode()) or "CUSTOM", code.Version(), True
        return _enum_names("BuiltinOperator").get(number, f"BUILTIN_{number}"), code.Version(), False

    def _buffer(self, buffer: Any) -> _Buffer:
        if buffer.DataLength():
            values = buffer.DataAsNumpy()  # NumPy refuses a slice that ends outside the file
            start = values.__array_interface__["data"][0] - self._address
            return _Buffer(start, len(values), True)
        # Models over 2 GB keep their weights behind the flatbuffer; 0 and 1 mean that there is none.
        start, size = buffer.Offset(), buffer.Size()
        if start > 1 and start + size > len(self._data):
            raise FlatbufferError("a buffer ends outside the file")
        return _Buffer(start, size, start > 1)

    def _subgraph(self, table: Any, codes: list[tuple[str, int, bool]], buffers: list[_Buffer]) -> Subgraph:
        tensors = tuple(self._tensor(tensor, buffers) for tensor in self._tables(table, "Tensors"))
        operators = tuple(self._operator(item, codes, len(tensors)) for item in self._tables(table, "Operators"))
        return Subgraph(
            name=self._text(table.Name()),
            tensors=tensors,
            operators=operators,
            inputs=self._indices(table, "Inputs", len(tensors)),
            outputs=self._indices(table, "Outputs", len(tensors)),
        )

    def _tensor(self, table: Any, buffers: list[_Buffer]) -> Tensor:
        name = self._text(table.Name())
        if table.ShapeLength() > _MAX_DIMENSIONS:
            raise FlatbufferError(f"tensor '{_short(name)}' has {table.ShapeLength()} dimensions")
        shape = tuple(self._numbers(table, "Shape").tolist())
        dtype = _enum_names("TensorType").get(table.Type())
        if dtype is None:
            raise FlatbufferError(f"tensor '{_short(name)}' has the unknown type {table.Type()}")
        if min(shape, default=0) < 0:
            raise FlatbufferError(f"tensor '{_short(name)}' has the negative shape {shape}")
        if not 0 <= table.Buffer() < len(buffers):
            raise FlatbufferError(f"tensor '{_short(name)}' lies in buffer {table.Buffer()} of {len(buffers)}")
        buffer, bits = buffers[table.Buffer()], _ITEM_BITS.get(dtype.lower())
        if buffer.constant and bits and table.Sparsity() is None and 8 * buffer.size < bits * math.prod(shape):
            raise FlatbufferError(f"tensor '{_short(name)}' of shape {shape} has only {buffer.size} bytes")
        scales, zero_points, axis = self._quantization(table.Quantization(), name, shape)
        data = (buffer.start, buffer.start + buffer.size) if buffer.constant else None
        return Tensor(name, shape, dtype.lower(), buffer.constant, scales, zero_points, axis, data)

    def _quantization(
        self, table: Any, name: str, shape: tuple[int, ...]
    ) -> tuple[tuple[float, ...], tuple[int, ...], int | None]:
        if table is None or not table.ScaleLength():
            return (), (), None
        scales = tuple(self._numbers(table, "Scale").tolist())
        zero_points = tuple(self._numbers(table, "ZeroPoint").tolist()) or (0,) * len(scales)
        axis = table.QuantizedDimension() if len(scales) > 1 else None
        if len(zero_points) != len(scales):
            raise FlatbufferError(
                f"tensor '{_short(name)}' has {len(scales)} scales and {len(zero_points)} zero points"
            )
        if axis is not None and not (0 <= axis < len(shape) and shape[axis] == len(scales)):
            raise FlatbufferError(f"tensor '{_short(name)}' of shape {shape} has {len(scales)} scales on axis {axis}")
        return scales, zero_points, axis

    def _operator(self, table: Any, codes: list[tuple[str, int, bool]], n_tensors: int) -> Operator:
        if not 0 <= table.OpcodeIndex() < len(codes):
            raise FlatbufferError(f"an operator has code {table.OpcodeIndex()} of {len(codes)}")
        name, version, custom = codes[table.OpcodeIndex()]
        return Operator(
            name=name,
            version=version,
            custom=custom,
            inputs=self._indices(table, "Inputs", n_tensors, lowest=-1),
            outputs=self._indices(table, "Outputs", n_tensors),
            options=self._options(table),
        )

    def _options(self, table: Any) -> Mapping[str, Any]:
        kind, stored = _enum_names("BuiltinOptions").get(table.BuiltinOptionsType(), "NONE"), table.BuiltinOptions()
        if kind == "NONE" or stored is None:
            return MappingProxyType({})
        if not 0 < stored.Pos < len(self._data):
            raise FlatbufferError("the options of an operator lie outside the file")
        options = getattr(_schema(), kind)()
        options.Init(stored.Bytes, stored.Pos)
        names = _option_names(kind)
        values = {name: getattr(options, accessor)() for accessor, name in names}
        self._charge(sum(len(value) if isinstance(value, bytes) else 1 for value in values.values()))
        for name in _OPTION_ENUMS.keys() & values.keys():
            values[name] = _enum_names(_OPTION_ENUMS[name]).get(values[name], str(values[name]))
        # texts are names of variables; nested tables are of no use to anyone yet
        return MappingProxyType({name: value for name, value in values.items() if isinstance(value, int | float | str)})

    def _indices(self, table: Any, field: str, n_tensors: int, *, lowest: int = 0) -> tuple[int, ...]:
        indices = tuple(self._numbers(table, field).tolist())
        if indices and not (lowest <= min(indices) and max(indices) < n_tensors):
            outside = min(indices) if min(indices) < lowest else max(indices)
            raise FlatbufferError(f"its {field.lower()} name tensor {outside} of {n_tensors}")
        return indices

    def _signature(self, table: Any, subgraphs: tuple[Subgraph, ...]) -> Signature:
        name = self._text(table.SignatureKey())
        if not 0 <= table.SubgraphIndex() < len(subgraphs):
            raise FlatbufferError(
                f"signature '{_short(name)}' names subgraph {table.SubgraphIndex()} of {len(subgraphs)}"
            )
        n_tensors = len(subgraphs[table.SubgraphIndex()].tensors)
        return Signature(
            name=name,
            subgraph=table.SubgraphIndex(),
            inputs=self._tensor_map(table, "Inputs", n_tensors),
            outputs=self._tensor_map(table, "Outputs", n_tensors),
        )

    def _tensor_map(self, table: Any, field: str, n_tensors: int) -> tuple[tuple[str, int], ...]:
        entries = tuple((self._text(entry.Name()), entry.TensorIndex()) for entry in self._tables(table, field))
        for name, index in entries:
            if not 0 <= index < n_tensors:
                raise FlatbufferError(f"signature entry '{_short(name)}' names tensor {index} of {n_tensors}")
        return entries
