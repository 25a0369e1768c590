"""Run a `.tflite` file on arrays of real numbers: quantizes what goes in, dequantizes what comes out. No TensorFlow."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.errors import DataError, DeviceError
from tflite_export.flatbuffer import Tensor, TfliteModel, read_flatbuffer


class TfliteRunner:
    """One LiteRT interpreter on one checked file. Not for use by two threads at once.

    Values are always real numbers, whatever the file stores: an image that the Keras model takes is the image to give.

    Attributes:
        model: what the file holds.
    """

    def __init__(self, source: str | Path | bytes, *, threads: int = 1) -> None:
        """Load a file and allocate its tensors.

        Args:
            source: path of the file, or its bytes.
            threads: how many threads one inference may use.

        Raises:
            FlatbufferError: the file is damaged.
            DeviceError: the file needs operators that this runtime does not have, or a size that it cannot allocate.
        """
        self.model = read_flatbuffer(source)
        self._interpreter = _load(source, self.model, threads)
        self._inputs = _named(self._interpreter.get_input_details(), self.model.inputs, self.model.input_names)
        self._outputs = _named(self._interpreter.get_output_details(), self.model.outputs, self.model.output_names)

    @property
    def delegated(self) -> bool:
        """Whether XNNPACK has taken over at least one operator."""
        # The only place where the Python runtime tells: the partitions of a delegate are appended as operators.
        return any(operator["op_name"] == "DELEGATE" for operator in self._interpreter._get_ops_details())

    def run(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name, float32 arrays of shape (n, ...), of n images run one by one.

        Args:
            inputs: real numbers of shape (n, ...); by input name where the file has several inputs.

        Raises:
            DataError: an input is missing, unknown, or does not fit the file.
            DeviceError: an operator failed.
        """
        arrays = self._check(inputs)
        results: dict[str, list[np.ndarray]] = {name: [] for name in self._outputs}
        for image in range(len(next(iter(arrays.values())))):
            for name, (index, tensor) in self._inputs.items():
                self._interpreter.set_tensor(index, quantize(arrays[name][image : image + 1], tensor))
            self.invoke()
            for name, (index, tensor) in self._outputs.items():
                with self._failures():
                    stored = self._interpreter.get_tensor(index)
                results[name].append(dequantize(stored, tensor))
        return {name: self._joined(name, parts) for name, parts in results.items()}

    def fill(self, *, seed: int = 0) -> None:
        """Set every input to random values (all values of an integer type, a standard normal for floats)."""
        rng = np.random.default_rng(seed)
        for index, tensor in self._inputs.values():
            dtype = np.dtype(tensor.dtype)
            if dtype.kind in "iu":
                values = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, tensor.shape, dtype, endpoint=True)
            else:
                values = rng.standard_normal(tensor.shape).astype(dtype)
            self._interpreter.set_tensor(index, values)

    def invoke(self) -> None:
        """Run once on the inputs that are set.

        Raises:
            DeviceError: an operator failed.
        """
        with self._failures():
            self._interpreter.invoke()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise DeviceError(f"LiteRT failed while it ran '{self.model.source}': {_first_line(error)}.") from error

    def _check(self, inputs: np.ndarray | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = dict(inputs) if isinstance(inputs, Mapping) else {next(iter(self._inputs)): np.asarray(inputs)}
        if set(given) != set(self._inputs):
            raise DataError(
                f"'{self.model.source}' has the inputs {sorted(self._inputs)}, but got {sorted(given)}: "
                "give a dict with one array for each."
            )
        lengths = {len(array) for array in given.values()}
        if len(lengths) != 1:
            raise DataError(f"the inputs differ in their number of images: {sorted(lengths)}.")
        for name, (_, tensor) in self._inputs.items():
            if tensor.shape[:1] != (1,) or given[name].shape[1:] != tensor.shape[1:]:
                raise DataError(
                    f"input '{name}' of '{self.model.source}' takes one image of shape {tensor.shape} at a time, "
                    f"but got an array of shape {given[name].shape}: give (n, {', '.join(map(str, tensor.shape[1:]))})."
                )
        return given

    def _joined(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        shape = self._outputs[name][1].shape
        if not parts:
            return np.empty((0, *shape[1:]), np.float32)
        return np.concatenate(parts) if shape[:1] == (1,) else np.stack(parts)


def _load(source: str | Path | bytes, model: TfliteModel, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    try:
        if isinstance(source, bytes):
            interpreter = Interpreter(model_content=source, num_threads=threads)
        else:
            interpreter = Interpreter(model_path=str(source), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        custom = f"; it needs the custom operators {list(model.custom_operators)}" if model.custom_operators else ""
        raise DeviceError(f"LiteRT cannot run '{model.source}': {_first_line(error)}{custom}.") from error
    return interpreter


def _first_line(error: BaseException) -> str:
    # The runtime's messages go on with links and C++ file names.
    return str(error).partition("\n")[0].rstrip(".")


def _named(
    details: list[dict[str, Any]], tensors: tuple[Tensor, ...], names: tuple[str, ...]
) -> dict[str, tuple[int, Tensor]]:
    return {name: (detail["index"], tensor) for name, detail, tensor in zip(names, details, tensors, strict=True)}


def quantize(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return real numbers as the tensor stores them: rounded to its steps, clipped to its type."""
    dtype = np.dtype(tensor.dtype)
    if not tensor.scales or dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    steps = np.round(np.asarray(values, np.float64) / tensor.scales[0]) + tensor.zero_points[0]
    return np.clip(steps, limits.min, limits.max).astype(dtype)


def dequantize(stored: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return the real numbers that a tensor stores, float32."""
    if not tensor.scales or stored.dtype.kind == "f":
        return stored.astype(np.float32)
    return ((stored.astype(np.float64) - tensor.zero_points[0]) * tensor.scales[0]).astype(np.float32)
