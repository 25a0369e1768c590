"""Run a `.tflite` file operator by operator over many images: what each one reads and writes. No TensorFlow.

Each operator becomes a file of its own, run by the same runtime, so its results are those of the whole file. The
network runs once, whatever is asked of its layers, and an operator can be run on other inputs than it got.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np

from tflite_export.errors import DeviceError
from tflite_export.flatbuffer import Subgraph, Tensor, TfliteModel, read_constant, read_flatbuffer

_NO_ACTIVATION = 0


def real_values(stored: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return the real numbers that a tensor stores, float32; per channel where its scales are.

    Args:
        stored: of the tensor's shape, or with an axis of images in front.
        tensor: says how they are stored.
    """
    if not tensor.scales or stored.dtype.kind == "f":
        return stored.astype(np.float32)
    scales, zeros = np.asarray(tensor.scales), np.asarray(tensor.zero_points)
    if tensor.axis is not None:
        shape = [1] * stored.ndim
        shape[tensor.axis + stored.ndim - len(tensor.shape)] = -1
        scales, zeros = scales.reshape(shape), zeros.reshape(shape)
    return ((stored.astype(np.float64) - zeros) * scales).astype(np.float32)


class OperatorFile:
    """A `.tflite` file taken apart into its operators.

    Attributes:
        model: what the file holds.
        graph: its only subgraph.
        data: its bytes, with what `set_constant` has changed.
    """

    def __init__(self, data: bytes, *, name: str | None = None) -> None:
        """Read a file.

        Raises:
            FlatbufferError: the file is damaged.
            DeviceError: the file has branches or loops, which have no order of operators.
        """
        from ai_edge_litert import schema_py_generated

        self.model: TfliteModel = read_flatbuffer(data, name=name)
        if len(self.model.subgraphs) != 1:
            raise DeviceError(f"'{self.model.source}' has branches or loops: its operators cannot be run one by one.")
        self.graph: Subgraph = self.model.subgraphs[0]
        self.data = bytearray(data)
        self._schema: Any = schema_py_generated
        self._parts = schema_py_generated.ModelT.InitFromPackedBuf(data, 0)

    def constant(self, index: int) -> np.ndarray:
        """Return the stored values of a constant tensor."""
        return read_constant(bytes(self.data), self.graph.tensors[index])

    def is_shared(self, index: int) -> bool:
        """Whether another tensor, or another operator, reads the same stored values."""
        data = self.graph.tensors[index].data
        owners = [i for i, tensor in enumerate(self.graph.tensors) if tensor.data == data]
        return len(owners) > 1 or sum(index in one.inputs for one in self.graph.operators) > 1

    def set_constant(self, index: int, values: np.ndarray) -> None:
        """Write other values of the same type and shape into a constant, in place."""
        first, last = self.graph.tensors[index].data or (0, 0)
        stored = np.ascontiguousarray(values).tobytes()
        self.data[first : first + len(stored)] = stored
        buffer = self._parts.buffers[self._parts.subgraphs[0].tensors[index].buffer]
        buffer.data = np.frombuffer(bytes(self.data[first:last]), np.uint8)

    def run_one(
        self, number: int, inputs: Mapping[int, np.ndarray], *, linear: bool = False, real: bool = False
    ) -> dict[int, np.ndarray]:
        """Run one operator on many images.

        Args:
            number: of the operator.
            inputs: stored values of shape (n, ...) of the tensors it reads, by index; constants are left out.
            linear: without its fused activation.
            real: in float32: `inputs` and outputs are real numbers, integer constants are those they stand for.

        Returns:
            What it writes, of shape (n, ...), by tensor index.

        Raises:
            DeviceError: the runtime cannot run it.
        """
        from ai_edge_litert.interpreter import Interpreter

        operator = self.graph.operators[number]
        fed = [i for i in dict.fromkeys(operator.inputs) if i in inputs]
        if not fed:
            raise DeviceError(f"operator {number} ({operator.name}) of '{self.model.source}' reads constants alone.")
        packed = self._packed(number, fed, linear=linear, real=real)
        try:
            interpreter = Interpreter(model_content=packed, num_threads=1)
            interpreter.allocate_tensors()
            sources = [detail["index"] for detail in interpreter.get_input_details()]
            targets = [detail["index"] for detail in interpreter.get_output_details()]
            results: list[list[np.ndarray]] = [[] for _ in targets]
            for image in range(len(inputs[fed[0]])):
                for place, index in zip(sources, fed, strict=True):
                    interpreter.set_tensor(place, inputs[index][image])
                interpreter.invoke()
                for found, place in zip(results, targets, strict=True):
                    found.append(interpreter.get_tensor(place))
        except (RuntimeError, ValueError) as error:
            first = str(error).partition("\n")[0]
            raise DeviceError(
                f"LiteRT cannot run operator {number} ({operator.name}) of '{self.model.source}' alone: {first}."
            ) from error
        return {index: np.stack(found) for index, found in zip(operator.outputs, results, strict=True)}

    def _packed(self, number: int, fed: Sequence[int], *, linear: bool, real: bool) -> bytes:
        """Return the file of one operator."""
        schema, graph = self._schema, self._parts.subgraphs[0]
        operator = copy.copy(graph.operators[number])
        order = [i for i in dict.fromkeys([*operator.inputs, *operator.outputs]) if i >= 0]
        place = {old: new for new, old in enumerate(order)} | {-1: -1}
        tensors, buffers = [], [schema.BufferT()]
        for index in order:
            tensor, stored = copy.copy(graph.tensors[index]), self._parts.buffers[graph.tensors[index].buffer]
            tensor.buffer = 0
            if stored.data is not None and index not in fed:
                tensor.buffer = len(buffers)
                buffers.append(self._real_buffer(index) if real else stored)
            if real and self.graph.tensors[index].scales:
                tensor.type, tensor.quantization = schema.TensorType.FLOAT32, None
            tensors.append(tensor)
        operator.inputs = [place[i] for i in operator.inputs]
        operator.outputs = [place[i] for i in operator.outputs]
        code = self._parts.operatorCodes[operator.opcodeIndex]
        operator.opcodeIndex = 0
        if linear:
            operator.builtinOptions = copy.copy(operator.builtinOptions)
            operator.builtinOptions.fusedActivationFunction = _NO_ACTIVATION
        part, model = schema.SubGraphT(), schema.ModelT()
        part.tensors, part.operators = tensors, [operator]
        part.inputs, part.outputs = [place[i] for i in fed], list(operator.outputs)
        model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [part], buffers
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _real_buffer(self, index: int) -> Any:
        tensor = self.graph.tensors[index]
        stored = self.constant(index)
        buffer = self._schema.BufferT()
        values = real_values(stored, tensor) if tensor.scales else stored
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        return buffer


class Walk:
    """Runs the operators of a file in order over some images; values that nobody reads any more are let go.

    Attributes:
        values: stored values of shape (n, ...) that are alive, by tensor index.
    """

    def __init__(self, file: OperatorFile, inputs: Mapping[int, np.ndarray]) -> None:
        """Begin with the stored values of each input tensor, of shape (n, ...) with the tensor's own shape behind."""
        self._file = file
        self.values = dict(inputs)
        operators = file.graph.operators
        self._last_use = {index: number for number, one in enumerate(operators) for index in one.inputs}
        self._last_use |= dict.fromkeys(file.graph.outputs, len(operators))

    def reads(self, number: int) -> dict[int, np.ndarray]:
        """What an operator reads, constants left out, by tensor index."""
        return {i: self.values[i] for i in self._file.graph.operators[number].inputs if i in self.values}

    def advance(self, number: int) -> dict[int, np.ndarray]:
        """Run the next operator; return what it wrote."""
        written = self._file.run_one(number, self.reads(number))
        self.values |= written
        for index in [i for i in self.values if self._last_use.get(i, -1) <= number]:
            del self.values[index]
        return written
