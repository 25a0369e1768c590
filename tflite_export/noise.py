"""Noise of each operator of an integer file against the float file it was made from, and what to keep in float for it.

No TensorFlow.
"""

from collections.abc import Callable, Mapping

import numpy as np

from tflite_export.interpreter import quantize
from tflite_export.layerwise import OperatorFile, Walk, real_values
from tflite_export.post_training import FIXED_RANGE, final_tensors, images_at_once, short_name, stored_inputs
from tflite_export.steps import Step

CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
KEEP_FLOAT = "float_below_db"
_N_IMAGES = 20
_LEAST_GAIN_DB = 0.5


def keep_noisy_in_float(
    quantized: bytes,
    calibrated: bytes,
    samples: Mapping[str, np.ndarray],
    *,
    below_db: float,
    requantize: Callable[[list[str]], bytes],
) -> tuple[bytes, dict[str, float], Step]:
    """Return a file whose noisiest operators compute in float, where what the network ends in gains by it.

    An operator's own noise is that of its output where it alone is in integers and reads the float file's values. Some
    of it stays where its neighbours are in integers: their steps round what it reads and writes.

    Args:
        quantized: the int8 file.
        calibrated: the float file that it was made from; tensors are matched by name.
        samples: images of shape (n, ...), by name of the input.
        below_db: operators whose own signal over noise is less, in dB, are tried in float.
        requantize: makes the int8 file again, without the operators that write the tensors of these names.

    Returns:
        The file, the own signal over noise in dB of what is in float, by the name of the tensor, and what was done.
    """
    exact = OperatorFile(calibrated)
    chosen = np.unique(np.linspace(0, len(next(iter(samples.values()))) - 1, _N_IMAGES).astype(int))
    images = {name: np.asarray(array[chosen]) for name, array in samples.items()}
    own, before = _measured(exact, OperatorFile(quantized), images)
    # What writes an output stays: the output is rounded in any case.
    outputs = {exact.graph.tensors[i].name for i in exact.graph.outputs}
    noisy = {name: db for name, db in own.items() if db < below_db and name not in outputs}
    if not noisy:
        least = f", the least is {min(own.values()):.1f}" if own else ""
        return quantized, {}, Step(KEEP_FLOAT, detail=f"no operator has less than {below_db:g} dB{least}")
    mixed = requantize(list(noisy))
    _, after = _measured(exact, OperatorFile(mixed), images)
    told = f"signal over noise at the end {before:.1f} -> {after:.1f} dB, {len(chosen)} images"
    names = tuple(f"{short_name(name)} ({db:.1f} dB)" for name, db in noisy.items())
    if after < before + _LEAST_GAIN_DB:
        reason = "in float it gains nothing: its neighbours' steps round the same"
        return quantized, {}, Step(KEEP_FLOAT, refused=tuple((name, reason) for name in names), detail=told)
    return mixed, noisy, Step(KEEP_FLOAT, names, detail=told)


def _measured(
    exact: OperatorFile, rounded: OperatorFile, images: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], float]:
    """Return the own signal over noise of each operator by the tensor it writes, and that of the tensors at the end."""
    operators, tensors = rounded.graph.operators, rounded.graph.tensors
    ends = {exact.graph.tensors[i].name for i in final_tensors(exact)}
    own: dict[str, float] = {}
    end = []
    for number, (signal, gathered, alone) in noise_sums(exact, rounded, images).items():
        name = tensors[operators[number].outputs[0]].name
        if (db := decibels(signal, alone)) is not None:
            own[name] = db
        # Of a softmax at the end what it reads counts: what it writes is rounded to 256 levels in any case.
        if name in ends and operators[number].name not in FIXED_RANGE:
            end.append(decibels(signal, gathered) or 0.0)
    return own, float(np.mean(end)) if end else -np.inf


def noise_sums(
    exact: OperatorFile,
    rounded: OperatorFile,
    named: Mapping[str, np.ndarray],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, np.ndarray]:
    """Return signal, gathered noise and own noise of each operator of an integer file, by its number, sums of squares.

    Args:
        exact: the float file.
        rounded: the integer file.
        named: images of shape (n, ...), by name of the input.
        progress: called with (images done, images in all).
    """
    written = _common_outputs(exact, rounded)
    n = min(len(array) for array in named.values())
    step = images_at_once(exact)
    totals: dict[int, np.ndarray] = {}
    for start in range(0, n, step):
        chunk = {name: array[start : start + step] for name, array in named.items()}
        for number, sums in _errors({"float": exact, "int": rounded}, chunk, written).items():
            totals[number] = totals.get(number, np.zeros(3)) + sums
        if progress:
            progress(min(start + step, n), n)
    return dict(sorted(totals.items()))


def _common_outputs(exact: OperatorFile, rounded: OperatorFile) -> dict[str, int]:
    """Return the operator of the float file that writes each tensor that both files have, by the tensor's name."""
    shapes = {tensor.name: tensor.shape for tensor in rounded.graph.tensors}
    operators = enumerate(exact.graph.operators)
    found = [(exact.graph.tensors[i], number) for number, one in operators for i in one.outputs]
    names = [tensor.name for tensor, _ in found]
    # A name that stands twice says nothing.
    return {
        tensor.name: number
        for tensor, number in found
        if names.count(tensor.name) == 1 and shapes.get(tensor.name) == tensor.shape
    }


def _errors(
    files: Mapping[str, OperatorFile], images: Mapping[str, np.ndarray], written: Mapping[str, int]
) -> dict[int, np.ndarray]:
    """Return signal, gathered noise and own noise of each operator of the integer file, sums over the images.

    Args:
        files: "float" and "int".
        images: by name of the input.
        written: number of the operator of the float file that writes each tensor, by the tensor's name.
    """
    exact, rounded = files["float"].graph, files["int"].graph
    leading, next_number = Walk(files["float"], stored_inputs(files["float"], images)), 0
    walk = Walk(files["int"], stored_inputs(files["int"], images))
    # Float values by name: as long as an operator of the integer file reads or writes a tensor of that name.
    held = {exact.tensors[i].name: value for i, value in leading.values.items()}
    last = {
        rounded.tensors[i].name: number
        for number, one in enumerate(rounded.operators)
        for i in (*one.inputs, *one.outputs)
        if i >= 0
    }
    sums: dict[int, np.ndarray] = {}
    for number, operator in enumerate(rounded.operators):
        output = operator.outputs[0]
        tensor = rounded.tensors[output]
        reads = {i: rounded.tensors[i] for i in walk.reads(number)}
        found = walk.advance(number)[output]
        if operator.name not in CONVERSIONS and tensor.name in written:
            while next_number <= written[tensor.name]:
                held |= {exact.tensors[i].name: value for i, value in leading.advance(next_number).items()}
                next_number += 1
            target = held[tensor.name].astype(np.float64)
            noises = [np.square(real_values(found, tensor) - target).sum(), np.nan]
            if all(one.name in held for one in reads.values()):
                fed = {i: quantize(held[one.name], one) for i, one in reads.items()}
                alone = files["int"].run_one(number, fed)[output]
                noises[1] = np.square(real_values(alone, tensor) - target).sum()
            sums[number] = np.array([np.square(target).sum(), *noises])
        for name in [one for one in held if last.get(one, -1) <= number]:
            del held[name]
    return sums


def decibels(signal: float, noise: float) -> float | None:
    """Return signal over noise; infinite where there is no noise, None where it is not known."""
    if np.isnan(noise):
        return None
    if noise == 0:
        return float(np.inf)
    return float(10 * np.log10(max(signal, 1e-30) / noise))
