"""Whether a file computes the same elsewhere as here: a fixed input, and how far two outputs lie apart."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tflite_export.devices import Answer
from tflite_export.devices.local import LocalDevice
from tflite_export.errors import DeviceError
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
from tflite_export.interpreter import dequantize

# How far outputs may lie from those of this machine, as a part of their spread. Other processors round float sums in
# another order (1e-6 each); a GPU computes in float16; eight-bit kernels differ by a step here and there, and steps add
# up through a deep network. Another network altogether is off by about 1.4.
_TOLERANCES = {"float32 on a CPU": 1e-3, "float32 elsewhere": 0.05, "quantized": 0.2}


def fixed_inputs(model: TfliteModel) -> list[np.ndarray]:
    """Return the same random inputs at every call, as the file stores them.

    All values of an integer type, a standard normal for floats.

    Raises:
        DeviceError: an input is of a type without numbers.
    """
    rng = np.random.default_rng(0)
    arrays = []
    for tensor in model.inputs:
        try:
            dtype = np.dtype(tensor.dtype)
        except TypeError as error:
            raise DeviceError(f"'{model.source}' has an input of type {tensor.dtype}, which cannot be made.") from error
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            arrays.append(rng.integers(limits.min, limits.max, tensor.shape, dtype, endpoint=True))
        elif dtype.kind == "b":
            arrays.append(rng.integers(0, 2, tensor.shape).astype(dtype))
        else:
            arrays.append(rng.standard_normal(tensor.shape).astype(dtype))
    return arrays


def local_outputs(path: Path, inputs: list[np.ndarray]) -> tuple[np.ndarray, ...] | None:
    """Return what this machine computes; None where it lacks an operator, such as one made for an accelerator."""
    if read_flatbuffer(path).custom_operators:
        return None
    return LocalDevice().fetch(path, inputs, threads=1).outputs


def output_difference(there: np.ndarray, here: np.ndarray, scales: Sequence[float]) -> tuple[float, float]:
    """Return the root mean square of a difference as a part of the spread of `here`, and in quantization steps.

    NaN in the same places is no difference; NaN in one of them only gives NaN.

    Args:
        there: real numbers of any shape.
        here: what they should be, of the same shape.
        scales: size of a step; empty where there are none: the second number is infinite then.
    """
    a, b = np.asarray(there, np.float64).ravel(), np.asarray(here, np.float64).ravel()
    both = np.isnan(a) & np.isnan(b)
    a, b = a[~both], b[~both]
    if not len(b):
        return 0.0, 0.0
    differing = a != b  # equal infinities are no difference
    if not differing.any():
        return 0.0, 0.0
    gaps, finite = a[differing] - b[differing], b[np.isfinite(b)]
    spread = (float(np.std(finite)) or float(np.abs(finite).max()) if len(finite) else 0) or 1.0
    steps = float(np.abs(gaps).max()) / scales[0] if scales else math.inf
    return math.sqrt(float(np.sum(gaps**2)) / len(b)) / spread, steps


def check_outputs(model: TfliteModel, answer: Answer, expected: Sequence[np.ndarray], *, on: str) -> float:
    """Return how far the outputs of a device are from the expected ones, as a part of their spread.

    Args:
        model: the file.
        answer: what the device gave.
        expected: what it should give, by output.
        on: name of the device.

    Raises:
        DeviceError: farther than rounding explains.
    """
    worst = 0.0
    delegate = answer.log.delegate if answer.log is not None else ""
    for tensor, there, here in zip(model.outputs, answer.outputs, expected, strict=True):
        quantized = bool(tensor.scales) or there.dtype.kind in "iu"
        on_cpu = delegate in ("", "CPU", "XNNPACK", "none")
        kind = "quantized" if quantized else "float32 on a CPU" if on_cpu else "float32 elsewhere"
        difference, steps = output_difference(dequantize(there, tensor), dequantize(here, tensor), tensor.scales)
        # One step on nearly constant outputs is rounding, however large a part of their spread it is.
        if difference > _TOLERANCES[kind] and steps > 1 or math.isnan(difference):
            raise DeviceError(
                f"'{model.source}' computes something else on '{on}' than on this machine: its output "
                f"'{tensor.name}' is off by {difference:.2g} of its spread, more than {_TOLERANCES[kind]:g} for "
                f"{kind}. It is the wrong file, or its delegate computes wrongly; nothing was timed."
            )
        worst = max(worst, difference)
    return worst
