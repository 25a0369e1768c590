"""Small `.tflite` networks that need no converter, for tests of devices and times."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tests.export.tflite_writer import Writer


def conv_network(
    depth: int, *, dtype: str = "float32", shape: tuple[int, ...] = (33, 31, 8), filters: int = 16
) -> bytes:
    """Return a file with 3x3 convolutions, biases and ReLUs, whose input is named as converters name it."""
    rng = np.random.default_rng(depth)
    writer, scale = Writer(), 0.05
    x = writer.tensor((1, *shape), dtype, scales=(scale,))
    writer.tensors[x].name = "serving_default_image:0"
    for number in range(depth):
        n_in = filters if number else shape[-1]
        if dtype == "int8":
            kernel = writer.tensor(
                (filters, 3, 3, n_in), "int8", rng.integers(-127, 128, (filters, 3, 3, n_in)), scales=(0.01,)
            )
            bias = writer.tensor((filters,), "int32", rng.integers(-2000, 2000, filters))
            writer.tensors[bias].quantization = schema.QuantizationParametersT()
            writer.tensors[bias].quantization.scale, writer.tensors[bias].quantization.zeroPoint = [scale * 0.01], [0]
            scale = 0.2 * 5**number
        else:
            kernel = writer.tensor((filters, 3, 3, n_in), dtype, rng.normal(0, 0.2, (filters, 3, 3, n_in)))
            bias = writer.tensor((filters,), dtype, rng.normal(0, 0.3, filters))
        y = writer.tensor((1, *shape[:2], filters), dtype, scales=(scale,))
        options = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1}
        fused = schema.ActivationFunctionType.RELU
        writer.operator(
            "CONV_2D", [x, kernel, bias], [y], kind="Conv2DOptions", fusedActivationFunction=fused, **options
        )
        x = y
    return writer.file()
