"""Accuracy of integer files without training: better ranges of activations, corrected biases. No TensorFlow.

Both work on the file: what TensorFlow calibrated is changed before it quantizes, and biases after.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tflite_export.errors import ExportError
from tflite_export.interpreter import quantize
from tflite_export.layerwise import OperatorFile, Walk, real_values
from tflite_export.steps import Step

EQUALIZE, CORRECT_BIAS = "equalize", "correct_bias"
MEASURE_RANGES, CLIP_MSE, CLIP_PERCENTILE = RANGES = "measure_ranges", "clip_mse", "clip_percentile"
STEPS = (EQUALIZE, *RANGES, CORRECT_BIAS)
"""In the order in which they are done."""
DEFAULT_STEPS: tuple[str, ...] = ()
"""None: on ResNet-56 no step gains what an image set of 1,000 could show (tests/experiments/quantization.py)."""

_SAMPLES_PER_IMAGE = 2_048
_CHUNK_BYTES = 256 << 20  # of the largest tensor, for all images that run at a time
_PERCENTILE = 99.99
_LEVELS = 255
_SHRINKS = np.linspace(0.3, 1.0, 71)
_BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
FIXED_RANGE = ("SOFTMAX", "LOGISTIC", "TANH", "L2_NORMALIZATION")
"""Operators whose output range the runtime prescribes."""


def set_ranges(calibrated: bytes, samples: Mapping[str, np.ndarray], *, method: str) -> tuple[bytes, Step]:
    """Return a calibrated file with other ranges of its activations, which its quantizer will read.

    TensorFlow 2.21 calibrates too wide: the range that it writes down for the input of an ADD is that of the sum, where
    both share memory.

    Args:
        calibrated: a float file whose tensors hold their smallest and largest value, as TensorFlow calibrates it.
        samples: images of shape (n, ...), by name of the input.
        method: "measure_ranges" takes the smallest and the largest value; "clip_mse" the range inside that rounds with
            the least squared error; "clip_percentile" the one that holds 99.99 % of the values.

    Returns:
        The file, and what was done.
    """
    file = OperatorFile(calibrated)
    seen = _seen_values(file, samples, spare=final_tensors(file))
    places = _range_places(calibrated)
    data, changed, kept = bytearray(calibrated), [], []
    for index, (values, low, high) in seen.items():
        if index not in places:
            continue
        (low_at, low_before), (high_at, high_before) = places[index]
        found = _best_range(values, min(low, 0.0), max(high, 0.0), method)
        if np.float32(found[0]) != low_before or np.float32(found[1]) != high_before:
            changed.append(short_name(file.graph.tensors[index].name))
            kept.append((found[1] - found[0]) / max(high_before - low_before, 1e-12))
            data[low_at : low_at + 4], data[high_at : high_at + 4] = (np.float32(one).tobytes() for one in found)
    detail = f"their ranges are {np.mean(kept):.0%} of TensorFlow's, on average" if kept else ""
    return bytes(data), Step(method, tuple(changed), detail=detail)


def _seen_values(
    file: OperatorFile, samples: Mapping[str, np.ndarray], *, spare: set[int]
) -> dict[int, tuple[np.ndarray, float, float]]:
    """Return some values of each float tensor that an operator writes, with the smallest and largest of all."""
    rng = np.random.default_rng(0)
    picked: dict[int, list[np.ndarray]] = {}
    limits: dict[int, tuple[float, float]] = {}
    for chunk in _chunks(file, len(next(iter(samples.values())))):
        walk = Walk(file, stored_inputs(file, {name: array[chunk] for name, array in samples.items()}))
        for number, operator in enumerate(file.graph.operators):
            for index, values in walk.advance(number).items():
                if values.dtype != np.float32 or index in spare or operator.name in FIXED_RANGE:
                    continue
                flat = values.reshape(len(values), -1)
                n = min(_SAMPLES_PER_IMAGE, flat.shape[1])
                # The same positions of each image in the chunk: drawing them anew costs more than reading them.
                picked.setdefault(index, []).append(flat[:, rng.choice(flat.shape[1], n, replace=False)].ravel())
                low, high = limits.get(index, (np.inf, -np.inf))
                limits[index] = min(low, float(values.min())), max(high, float(values.max()))
    return {index: (np.concatenate(parts), *limits[index]) for index, parts in picked.items()}


def final_tensors(file: OperatorFile) -> set[int]:
    """Outputs, and what their activation reads: large values there are the answer, not outliers."""
    last = [one for one in file.graph.operators if set(one.outputs) & set(file.graph.outputs)]
    return {*file.graph.outputs, *(index for one in last if one.name in FIXED_RANGE for index in one.inputs)}


def _best_range(values: np.ndarray, low: float, high: float, method: str) -> tuple[float, float]:
    """Return the range to quantize in, inside [low, high] and with 0 in it."""
    if method == MEASURE_RANGES:
        return low, high
    if method == CLIP_PERCENTILE:
        tail = (100 - _PERCENTILE) / 2
        below, above = np.percentile(values, [tail if low < 0 else 0, 100 - tail if low < 0 else _PERCENTILE])
        return max(low, min(float(below), 0.0)), min(high, max(float(above), 0.0))
    # A few thousand equal parts stand for the values: the error of a range is a sum over them.
    counts, edges = np.histogram(values, bins=4_096, range=(low, max(high, low + 1e-12)))
    centres = (edges[:-1] + edges[1:]) / 2
    best = (np.inf, low, high)
    for shrink in _SHRINKS:
        for first, last in {(low * shrink, high * shrink), (low, high * shrink), (low * shrink, high)}:
            step = (last - first) / _LEVELS
            rounded = np.clip(np.round(centres / step), np.floor(first / step), np.ceil(last / step)) * step
            best = min(best, (float(counts @ np.square(rounded - centres)), first, last))
    return best[1], best[2]


def correct_biases(quantized: bytes, calibrated: bytes, samples: Mapping[str, np.ndarray]) -> tuple[bytes, Step]:
    """Return an int8 file whose biases make up for the mean error of each layer, layer by layer from the front.

    Each layer's mean output before its activation, on what the corrected file feeds it, becomes that of the float file.

    Args:
        quantized: the int8 file.
        calibrated: the float file that it was made from; tensors are matched by name.
        samples: images of shape (n, ...), by name of the input.

    Returns:
        The file, and what was done.
    """
    wanted, file = OperatorFile(calibrated), OperatorFile(quantized)
    n = min(images_at_once(wanted), len(next(iter(samples.values()))))
    chosen = np.unique(np.linspace(0, len(next(iter(samples.values()))) - 1, n).astype(int))
    images = {name: array[chosen] for name, array in samples.items()}
    means = _Means(wanted, images)
    walk = Walk(file, stored_inputs(file, images))
    done, refused, shifts = [], [], []
    for number, operator in enumerate(file.graph.operators):
        name = file.graph.tensors[operator.outputs[0]].name
        if operator.name in _BIASED and file.graph.tensors[operator.outputs[0]].dtype == "int8":
            reason = _why_not(file, number, name, means)
            if reason:
                refused.append((short_name(name), reason))
            else:
                real = {i: real_values(one, file.graph.tensors[i]) for i, one in walk.reads(number).items()}
                (found,) = file.run_one(number, real, linear=True, real=True).values()
                error = means.of(name) - found.mean(axis=tuple(range(found.ndim - 1)), dtype=np.float64)
                bias = operator.inputs[2]
                steps = np.round(error / np.asarray(file.graph.tensors[bias].scales))
                stored = file.constant(bias).astype(np.int64) + steps.astype(np.int64)
                limits = np.iinfo(np.int32)
                file.set_constant(bias, np.clip(stored, limits.min, limits.max).astype(np.int32))
                done.append(short_name(name))
                shifts.append(float(np.abs(error).mean() / max(float(found.std()), 1e-12)))
        walk.advance(number)
    detail = f"mean outputs were off by {np.mean(shifts):.1%} of a standard deviation" if shifts else ""
    return bytes(file.data), Step(CORRECT_BIAS, tuple(done), tuple(refused), f"{detail}, {n} images" if detail else "")


def _why_not(file: OperatorFile, number: int, name: str, means: "_Means") -> str | None:
    operator = file.graph.operators[number]
    if len(operator.inputs) < 3 or operator.inputs[2] < 0 or not file.graph.tensors[operator.inputs[2]].constant:
        return "it has no bias"
    if file.graph.tensors[operator.inputs[2]].dtype != "int32" or file.is_shared(operator.inputs[2]):
        return "its bias is shared with another layer"
    return None if name in means.names else "the float file has no such layer"


class _Means:
    """Mean output of each layer of a float file before its activation, computed when the walk of another file asks."""

    def __init__(self, file: OperatorFile, samples: Mapping[str, np.ndarray]) -> None:
        self._file, self._walk, self._next = file, Walk(file, stored_inputs(file, samples)), 0
        outputs = [file.graph.tensors[one.outputs[0]].name for one in file.graph.operators]
        # A name that stands twice says nothing.
        self._number = {name: number for number, name in enumerate(outputs) if outputs.count(name) == 1}
        self.names = {name for name, number in self._number.items() if file.graph.operators[number].name in _BIASED}

    def of(self, name: str) -> np.ndarray:
        """Mean of a layer, of shape (channels,), float64; layers are asked for in the order of the file."""
        number = self._number[name]
        while self._next < number:
            self._walk.advance(self._next)
            self._next += 1
        (found,) = self._file.run_one(number, self._walk.reads(number), linear=True).values()
        return found.mean(axis=tuple(range(found.ndim - 1)), dtype=np.float64)


def stored_inputs(file: OperatorFile, samples: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return images as the file's input tensors store them, with the file's own axis of one image."""
    stored = {}
    for index, name in zip(file.graph.inputs, file.model.input_names, strict=True):
        if name not in samples:
            raise ExportError(f"the file has an input '{name}', and the images are for {sorted(samples)}.")
        tensor = file.graph.tensors[index]
        stored[index] = quantize(np.asarray(samples[name]), tensor).reshape(-1, *tensor.shape)
    return stored


def images_at_once(file: OperatorFile) -> int:
    """Return how many images may run through a file operator by operator without taking much memory."""
    largest = max(int(np.prod(tensor.shape)) for tensor in file.graph.tensors if not tensor.constant)
    return max(1, _CHUNK_BYTES // (4 * largest))


def _chunks(file: OperatorFile, n: int) -> Sequence[slice]:
    size = images_at_once(file)
    return [slice(start, start + size) for start in range(0, n, size)]


def _range_places(data: bytes) -> dict[int, tuple[tuple[int, float], tuple[int, float]]]:
    """Return where in a calibrated file each tensor's smallest and largest value stand, and those values."""
    from ai_edge_litert import schema_py_generated as schema

    base = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    graph = schema.Model.GetRootAs(data, 0).Subgraphs(0)
    places = {}
    for index in range(graph.TensorsLength()):
        found = graph.Tensors(index).Quantization()
        if found is None or found.MinLength() != 1 or found.MaxLength() != 1:
            continue
        low, high = (
            (one.__array_interface__["data"][0] - base, float(one[0]))
            for one in (found.MinAsNumpy(), found.MaxAsNumpy())
        )
        places[index] = (low, high)
    return places


def short_name(name: str) -> str:
    """The first of the Keras layers that a tensor's name lists."""
    return name.partition(";")[0]
