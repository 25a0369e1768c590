"""Write small `.tflite` files operator by operator with the schema's own writer, so that a test says what is in one."""

from dataclasses import dataclass, field
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema


@dataclass
class Writer:
    """Collects tensors and operators of one graph; tensors without values that nothing writes are its inputs."""

    tensors: list[Any] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=lambda: [schema.BufferT()])
    operators: list[Any] = field(default_factory=list)
    codes: list[Any] = field(default_factory=list)

    def tensor(self, shape=(), dtype="int8", values=None, *, scales=(0.1,), axis=0) -> int:
        """Add a tensor, a constant where it has values; integers of 8 bits are quantized."""
        new = schema.TensorT()
        new.name, new.shape, new.type = f"t{len(self.tensors)}", list(shape), getattr(schema.TensorType, dtype.upper())
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.broadcast_to(values, shape).astype(dtype).tobytes(), np.uint8)
            self.buffers.append(buffer)
            new.buffer = len(self.buffers) - 1
        if dtype in ("int8", "uint8", "int16") and scales:
            new.quantization = schema.QuantizationParametersT()
            new.quantization.scale, new.quantization.zeroPoint = list(scales), [0] * len(scales)
            new.quantization.quantizedDimension = axis
        self.tensors.append(new)
        return len(self.tensors) - 1

    def operator(self, name, inputs, outputs, *, version=1, custom=None, **options) -> int:
        """Add an operator; `options` as the schema spells them, with `kind` where the operator's name differs."""
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, name)
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        code.customCode = custom
        self.codes.append(code)
        new = schema.OperatorT()
        new.opcodeIndex, new.inputs, new.outputs = len(self.codes) - 1, list(inputs), list(outputs)
        if kind := options.pop("kind", None):
            new.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            new.builtinOptions = getattr(schema, f"{kind}T")()
            for key, value in options.items():
                assert hasattr(new.builtinOptions, key), key
                setattr(new.builtinOptions, key, value)
        self.operators.append(new)
        return len(self.operators) - 1

    def file(self) -> bytes:
        """Return the file."""
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        written = {index for operator in self.operators for index in operator.outputs}
        read = {index for operator in self.operators for index in operator.inputs}
        indices = range(len(self.tensors))
        graph.inputs = [i for i in indices if i not in written and not self.tensors[i].buffer]
        graph.outputs = [i for i in indices if i in written and i not in read]
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], self.buffers, self.codes
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())
