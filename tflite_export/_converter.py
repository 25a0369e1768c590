"""The worker process that converts: reads requests (one JSON object a line), answers each, until its input ends.

It runs Keras on TensorFlow whatever the parent runs, takes the memory that conversion needs with it when it ends, and
may be aborted by the converter without harm to the parent. Started by `worker.py` as `python -m
tflite_export._converter`; TensorFlow and Keras are imported inside its functions only.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export.errors import (
    DataError,
    DeviceError,
    ExportError,
    ModelError,
    OutputError,
    TfliteExportError,
)
from tflite_export.flatbuffer import TfliteModel, read_flatbuffer
from tflite_export.interpreter import TfliteRunner
from tflite_export.post_training import CORRECT_BIAS, EQUALIZE, RANGES, short_name
from tflite_export.schemes import INTEGER_SCHEMES
from tflite_export.steps import Step

N_PROBES = 16
# Float arithmetic in another order stays below 1e-4 on real networks; a file with wrong weights is off by 1e-1 or more.
FLOAT_TOLERANCE = 1e-2
# Weights rounded to 11 bits are off by 2e-4 each.
HALF_TOLERANCE = 5e-2
INTEGER_NOTE = 0.25
# A pass before the conversion that goes wrong is off by 1e-1 or more, too.
CLEAN_TOLERANCE = 1e-3
N_CLEAN_PROBES = 4
_HALF_TYPES = ("float16", "bfloat16")
_HALF_POLICIES = (*_HALF_TYPES, "mixed_float16", "mixed_bfloat16")
# Operators with which a file keeps its weights outside: it computes NaN.
_VARIABLE_OPERATORS = ("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE")
_IO_OPERATORS = ("QUANTIZE", "DEQUANTIZE")


def check_model(model: Any) -> None:
    """Refuse a Keras model that has no `.tflite` form.

    Raises:
        ModelError: the model has no symbolic inputs, a dynamic size, or another fixed batch than 1.
    """
    name = getattr(model, "name", type(model).__name__)
    if not getattr(model, "inputs", None):
        raise ModelError(
            f"model '{name}' has no symbolic inputs, because it is subclassed or not built: "
            "wrap it as keras.Model(inputs, model(inputs)) with inputs = keras.Input(shape)."
        )
    for input_name, tensor in zip(_keras_input_names(model), model.inputs, strict=True):
        batch, *sizes = tensor.shape
        if None in sizes:
            raise ModelError(
                f"input '{input_name}' of model '{name}' has the dynamic shape {tuple(tensor.shape)}: "
                "a .tflite file needs fixed sizes, so build the model with them, as in keras.Input((224, 224, 3))."
            )
        if batch not in (None, 1):
            raise ModelError(
                f"input '{input_name}' of model '{name}' has the fixed batch {batch}: "
                "a .tflite file takes one image at a time, so build the model without a batch size."
            )


def _keras_input_names(model: Any) -> list[str]:
    # `tensor.name` is numbered anew by each load; the name of the layer is the one that the user gave.
    return [tensor._keras_history.operation.name for tensor in model.inputs]


def _output_names(model: Any) -> list[str]:
    return signature_names([tensor._keras_history.operation.name for tensor in model.outputs])


def _call(model: Any, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs in the order of `model.outputs`, from inputs in the order of `model.inputs`."""
    import keras

    packed = (
        inputs[0] if isinstance(model, keras.Sequential) else keras.tree.pack_sequence_as(model.input, list(inputs))
    )
    return keras.tree.flatten(model(packed, training=False))


def signature_names(names: Sequence[str]) -> list[str]:
    """Return names that a signature may have: letters, digits and underscores, not starting with a digit, unique."""
    clean: list[str] = []
    for name in names:
        base = re.sub(r"\W", "_", name, flags=re.ASCII)
        base = base if base and not base[0].isdigit() else f"_{base}"
        candidates = (base, *(f"{base}_{i}" for i in range(1, len(names) + 1)))
        clean.append(next(candidate for candidate in candidates if candidate not in clean))
    return clean


def serve(requests: Iterator[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Convert models until `requests` ends; `answer` gets progress lines and one result or error for each request."""
    for line in requests:
        request = json.loads(line)
        # Classes of the user's own are found where the parent finds them now.
        sys.path += [entry for entry in request["sys_path"] if entry not in sys.path]
        try:
            answer({"result": _convert(request, lambda what: answer({"progress": what}))})
        except TfliteExportError as error:
            cause = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ else ""
            answer({"error": type(error).__name__, "message": str(error), "cause": cause})


def _convert(request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    started = time.monotonic()
    progress("loading the model")
    model, notes = _load_model(request)
    check_model(model)
    names = signature_names(_keras_input_names(model))
    _check_norms(model, request["quantize"], notes)
    samples = _samples(request, model, names, notes)
    cleaned, steps = _cleaned(model, names, request, samples, progress)
    progress("converting")
    data, after, kept = _convert_bytes(cleaned, names, _output_names(model), request, samples, progress)
    del cleaned
    progress("checking the file")
    _write_bytes(Path(request["output"]), data)
    file = read_flatbuffer(data)
    _check_operators(file, model.name)
    error = _largest_error(model, names, data, samples)
    _judge_error(error, request["quantize"], model.name, notes)
    float_tensors, float_operators = _left_in_float(file, request, kept)
    return {
        "operators": file.operator_counts,
        "float_tensors": float_tensors,
        "float_operators": float_operators,
        "float_layers": {short_name(name): db for name, db in kept.items()},
        "select_operators": list(file.select_operators),
        "input_names": list(file.input_names),
        "output_names": list(file.output_names),
        "max_error": error,
        "sha256": file.sha256,
        "notes": notes,
        "steps": [asdict(step) for step in (*steps, *after)],
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": _peak_memory_bytes(),
        "versions": {name: version(name) for name in ("tensorflow", "keras", "ai-edge-litert")},
    }


def _write_bytes(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(
            f"cannot write temporary files in '{path.parent}': {error.strerror or error}. "
            "Set TMPDIR to a disk with space."
        ) from error


def _load_model(request: dict[str, Any]) -> tuple[Any, list[str]]:
    import keras

    # Names that Keras numbers itself end up in the file: number from the start for each model, whatever came before.
    keras.backend.clear_session()
    keras.config.set_dtype_policy("float32")
    label = request["label"]
    try:
        custom_objects = {name: _find_class(module, name) for module, name in request["custom_objects"]}
        model = keras.models.load_model(
            request["model"], custom_objects=custom_objects, compile=False, safe_mode=request["safe_mode"]
        )
    # All that keras raises on classes it cannot find, on configurations it cannot read, and on damaged archives.
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OSError, ImportError) as error:
        raise ModelError(
            f"the worker process cannot load {label}: {_first_lines(error)} "
            "Classes of your own must be in a module that can be imported (not in the main script or a notebook)."
        ) from error
    return _in_float32(model)


def _find_class(module: str, name: str) -> Any:
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _in_float32(model: Any) -> tuple[Any, list[str]]:
    """Return the model with every half-precision policy replaced by float32, and a note if there was one.

    The converter has no float16 convolutions.
    """
    import keras

    found: set[str] = set()
    config = _without_half_policies(keras.saving.serialize_keras_object(model), found)
    if not found:
        return model, []
    converted = keras.saving.deserialize_keras_object(config)
    converted.set_weights(model.get_weights())
    return converted, [f"converted from {', '.join(sorted(found))} to float32 first"]


def _without_half_policies(value: Any, found: set[str]) -> Any:
    """Return a serialized model with float32 for each policy, and each type of a tensor, in half precision."""
    if isinstance(value, list | tuple):
        return type(value)(_without_half_policies(item, found) for item in value)
    if not isinstance(value, dict):
        return value
    if value.get("class_name") == "DTypePolicy" and value["config"]["name"] in _HALF_POLICIES:
        found.add(value["config"]["name"])
        return value | {"config": {"name": "float32"}}
    return {
        key: "float32" if key == "dtype" and item in _HALF_TYPES else _without_half_policies(item, found)
        for key, item in value.items()
    }


def _check_norms(model: Any, scheme: str, notes: list[str]) -> None:
    """Say before the conversion that integer ranges of a network that was never trained mean nothing."""
    norms = [layer for layer in model._flatten_layers() if type(layer).__name__ == "BatchNormalization"]
    fresh = [one.name for one in norms if not np.any(one.moving_mean) and np.all(np.equal(one.moving_variance, 1))]
    if scheme not in INTEGER_SCHEMES or not fresh:
        return
    told = f"{len(fresh)} BatchNormalization layers of model '{model.name}' (first '{fresh[0]}') were never trained"
    if scheme == "int16x8" and len(fresh) == len(norms):
        raise ModelError(f"{told}: its int16x8 file would not load. Train the model, or renew the norms on images.")
    notes.append(f"{told}: accuracies of this file mean nothing")


def _samples(request: dict[str, Any], model: Any, names: list[str], notes: list[str]) -> dict[str, np.ndarray]:
    """Return the calibration arrays by signature name, memory-mapped, or random probes where there are none."""
    if not request["calibration"]:
        rng = np.random.default_rng(0)
        return {
            name: rng.uniform(-1, 1, (N_PROBES, *tensor.shape[1:])).astype(tensor.dtype)
            for name, tensor in zip(names, model.inputs, strict=True)
        }
    arrays = [np.load(path, mmap_mode="r") for path in request["calibration"]]
    keys = request["calibration_names"] or _keras_input_names(model)
    if len(keys) != len(arrays) or sorted(keys) != sorted(_keras_input_names(model)):
        raise DataError(
            f"the calibration data holds {len(arrays)} arrays ({', '.join(keys)}), but model '{model.name}' has the "
            f"inputs {_keras_input_names(model)}: give one array for each, by name where there are several."
        )
    by_key = dict(zip(keys, arrays, strict=True))
    samples = {name: by_key[key] for name, key in zip(names, _keras_input_names(model), strict=True)}
    for name, tensor in zip(names, model.inputs, strict=True):
        if samples[name].shape[1:] != tuple(tensor.shape[1:]):
            raise DataError(
                f"the calibration data for input '{name}' has shape {samples[name].shape}, "
                f"but model '{model.name}' takes (n, {', '.join(map(str, tensor.shape[1:]))})."
            )
    _note_range(model, names, samples, notes)
    return samples


def _note_range(model: Any, names: list[str], samples: Mapping[str, np.ndarray], notes: list[str]) -> None:
    """Compare the calibration range with what a Rescaling layer behind the input maps to 1, where there is one."""
    for name, tensor in zip(names, model.inputs, strict=True):
        for layer in model.layers:
            if type(layer).__name__ != "Rescaling" or layer.input is not tensor or np.ndim(layer.scale):
                continue
            expected = (1 - np.max(layer.offset)) / layer.scale
            low, high = float(samples[name].min()), float(samples[name].max())
            if not 0.05 < max(abs(low), abs(high)) / abs(expected) < 20:
                notes.append(
                    f"the calibration images for '{name}' range from {low:.4g} to {high:.4g}, but layer "
                    f"'{layer.name}' expects values up to {expected:.4g}"
                )


def _cleaned(
    model: Any,
    names: list[str],
    request: dict[str, Any],
    samples: Mapping[str, np.ndarray],
    progress: Callable[[str], None],
) -> tuple[Any, tuple[Step, ...]]:
    """Return the model rewritten for the file, compared with what it was, and what was done.

    Raises:
        ExportError: the rewritten model computes something else, which is a fault of ours.
    """
    if not request["clean"]:
        return model, ()
    from tflite_export.clean import Purpose, clean_model

    progress("rewriting the model")
    purpose = Purpose(
        integer=request["quantize"] in INTEGER_SCHEMES,
        edgetpu=request["target"] == "edgetpu",
        fold_input=request["input_normalization"] == "fold",
    )
    cleaned, steps = clean_model(model, purpose)
    if EQUALIZE in request["post_training"]:
        from tflite_export.equalization import equalize

        progress("equalizing channels")
        cleaned, step = equalize(cleaned, [samples[name] for name in names])
        steps = (*steps, step)
    if cleaned is model:
        return model, steps
    arrays = [
        np.asarray(samples[name][:N_CLEAN_PROBES], tensor.dtype)
        for name, tensor in zip(names, model.inputs, strict=True)
    ]
    for wanted, found in zip(_keras_outputs(model, arrays), _keras_outputs(cleaned, arrays), strict=True):
        error = float(np.abs(found - wanted).max()) / (float(np.abs(wanted).max()) or 1.0)
        if np.isfinite(wanted).all() and not error <= CLEAN_TOLERANCE:
            done = ", ".join(step.name for step in steps if step.done)
            raise ExportError(
                f"model '{model.name}' differs by {error:.2g} of its largest output after the passes {done}: "
                "export it with clean=False, and tell us."
            )
    return cleaned, steps


def _convert_bytes(
    model: Any,
    names: list[str],
    output_names: list[str],
    request: dict[str, Any],
    samples: Mapping[str, np.ndarray],
    progress: Callable[[str], None],
) -> tuple[bytes, tuple[Step, ...], dict[str, float]]:
    """Return the file, what was done for its accuracy, and what is in float for it, by tensor."""
    import tensorflow as tf
    from tensorflow.lite.python.convert_phase import ConverterError

    try:
        function = _concrete_function(model, names, output_names)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], _variable_holder(model))
        _set_scheme(converter, request, model, names, samples)
        in_steps = {*RANGES, CORRECT_BIAS} & set(request["post_training"]) or request["float_copy"]
        if not in_steps and request["float_below_db"] is None:
            return converter.convert(), (), {}
        return _quantize_in_steps(converter, request, samples, progress)
    except ModelError:
        raise
    except (ConverterError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        raise ExportError(
            f"TensorFlow {tf.__version__} cannot convert model '{model.name}' to {request['quantize']}: "
            f"{_first_lines(error)}"
        ) from error


def _quantize_in_steps(
    converter: Any, request: dict[str, Any], samples: Mapping[str, np.ndarray], progress: Callable[[str], None]
) -> tuple[bytes, tuple[Step, ...], dict[str, float]]:
    """Calibrate, set the ranges, quantize, correct the biases: what `convert` does, with our steps between."""
    from tensorflow.lite.python.convert import mlir_quantize

    from tflite_export.noise import KEEP_FLOAT, keep_noisy_in_float
    from tflite_export.post_training import correct_biases, set_ranges

    steps: list[Step] = []
    converter._experimental_calibrate_only = True
    calibrated = bytes(converter.convert())
    for method in RANGES:
        if method in request["post_training"]:
            progress("measuring ranges")
            try:
                calibrated, step = set_ranges(calibrated, samples, method=method)
            except DeviceError as error:  # loops, branches, operators that do not run alone
                step = Step(method, refused=((request["label"], str(error)),))
            steps.append(step)
    if request["float_copy"]:
        _write_bytes(Path(request["output"]).with_suffix(".float"), calibrated)

    def quantized_without(names: list[str]) -> bytes:
        return bytes(
            mlir_quantize(
                calibrated,
                input_data_type=converter.inference_input_type,
                output_data_type=converter.inference_output_type,
                denylisted_nodes=names,
                disable_per_channel_for_dense_layers=request["target"] == "edgetpu",
            )
        )

    quantized = quantized_without([])
    kept: dict[str, float] = {}
    if request["float_below_db"] is not None:
        progress("measuring the noise of each operator")
        try:
            quantized, kept, step = keep_noisy_in_float(
                quantized, calibrated, samples, below_db=request["float_below_db"], requantize=quantized_without
            )
        except DeviceError as error:
            step = Step(KEEP_FLOAT, refused=((request["label"], str(error)),))
        steps.append(step)
    if CORRECT_BIAS in request["post_training"]:
        progress("correcting biases")
        try:
            quantized, step = correct_biases(quantized, calibrated, samples)
        except DeviceError as error:
            step = Step(CORRECT_BIAS, refused=((request["label"], str(error)),))
        steps.append(step)
    return quantized, tuple(steps), kept


def _concrete_function(model: Any, names: list[str], output_names: list[str]) -> Any:
    import tensorflow as tf

    def call(*inputs: Any) -> dict[str, Any]:
        return dict(zip(output_names, _call(model, inputs), strict=True))

    specs = [
        tf.TensorSpec((1, *tensor.shape[1:]), tensor.dtype, name=name)
        for name, tensor in zip(names, model.inputs, strict=True)
    ]
    return tf.function(call, input_signature=specs, jit_compile=False).get_concrete_function()


def _variable_holder(model: Any) -> Any:
    """Return a tf.Module that holds the variables.

    With the Keras 3 model itself in its place, the converter writes a file without weights and says nothing.
    """
    import tensorflow as tf

    holder = tf.Module()
    holder.held_variables = [variable.value for variable in model.variables]
    return holder


def _set_scheme(
    converter: Any, request: dict[str, Any], model: Any, names: list[str], samples: Mapping[str, np.ndarray]
) -> None:
    import tensorflow as tf

    scheme = request["quantize"]
    if scheme == "float32":
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if scheme == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif scheme in INTEGER_SCHEMES:
        _set_integers(converter, request, model, names, samples)


def _set_integers(
    converter: Any, request: dict[str, Any], model: Any, names: list[str], samples: Mapping[str, np.ndarray]
) -> None:
    import tensorflow as tf

    dtypes = {name: tensor.dtype for name, tensor in zip(names, model.inputs, strict=True)}
    for name, dtype in dtypes.items():
        if dtype != "float32":
            raise ModelError(
                f"input '{name}' of model '{model.name}' has the type {dtype}, and {request['quantize']} export needs "
                "float32 inputs: "
                "export as float32, or move the part that takes integers out of the model."
            )

    def representative() -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(samples[names[0]])):
            yield {name: np.asarray(samples[name][i : i + 1], dtypes[name]) for name in names}

    wide = "EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8"
    kernels = "TFLITE_BUILTINS_INT8" if request["quantize"] == "int8" else wide
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [getattr(tf.lite.OpsSet, kernels)]
    converter.inference_input_type = converter.inference_output_type = tf.as_dtype(request["input_dtype"])
    # The Edge TPU's compiler is older than scales per output of a Dense layer.
    converter._experimental_disable_per_channel_quantization_for_dense_layers = request["target"] == "edgetpu"


def _first_lines(error: BaseException) -> str:
    """Return what matters of a message that can be pages long: its lines with 'error:', or its first ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    chosen = [line for line in lines if "error:" in line] or lines
    text = " ".join(chosen[:3])
    return text if len(text) <= 600 else f"{text[:600]} ..."


def _check_operators(file: TfliteModel, label: str) -> None:
    variables = [name for name in file.operator_counts if name in _VARIABLE_OPERATORS]
    if variables:
        raise ExportError(f"the file made from model '{label}' holds no weights: it reads them with {variables}.")
    if file.custom_operators:
        raise ExportError(
            f"the file made from model '{label}' needs {list(file.custom_operators)}, which the plain runtime does "
            "not have: replace the layers that make them."
        )


def _largest_error(model: Any, names: list[str], data: bytes, samples: Mapping[str, np.ndarray]) -> float:
    """Return max|difference| / max|Keras output|, the largest over the outputs, on some of the samples.

    Raises:
        ExportError: the file gives values that are not finite where Keras gives finite ones.
    """
    chosen = np.unique(np.linspace(0, len(samples[names[0]]) - 1, N_PROBES).astype(int))
    arrays = {
        name: np.asarray(samples[name][chosen], tensor.dtype) for name, tensor in zip(names, model.inputs, strict=True)
    }
    expected = _keras_outputs(model, list(arrays.values()))
    found = TfliteRunner(data).run(arrays)
    errors = []
    for name, wanted in zip(_output_names(model), expected, strict=True):
        if not np.isfinite(wanted).all():
            raise ModelError(f"model '{model.name}' itself gives values in '{name}' that are not finite: check it.")
        if not np.isfinite(found[name]).all():
            raise ExportError(f"the file made from model '{model.name}' gives values in '{name}' that are not finite.")
        scale = float(np.abs(wanted).max())
        errors.append(float(np.abs(found[name] - wanted).max()) / (scale or 1.0))
    return max(errors)


def _keras_outputs(model: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    # One image at a time, as the file does: a batch of large images would need the memory that conversion has used.
    rows = []
    for i in range(len(arrays[0])):
        rows.append([np.asarray(output) for output in _call(model, [array[i : i + 1] for array in arrays])])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _judge_error(error: float, quantize: str, label: str, notes: list[str]) -> None:
    tolerance = {"float32": FLOAT_TOLERANCE, "float16": HALF_TOLERANCE}.get(quantize, np.inf)
    if error > tolerance:
        raise ExportError(
            f"the {quantize} file made from model '{label}' differs from Keras by {error:.2g} of the largest output, "
            f"more than {tolerance:g}: a layer was converted wrongly."
        )
    if error > INTEGER_NOTE:
        notes.append(
            f"some {quantize} output differs from Keras by {100 * error:.0f} % of the largest output: "
            "compare the accuracies before you use the file"
        )


def _left_in_float(
    file: TfliteModel, request: dict[str, Any], kept: Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """Return the float tensors of an integer file that nobody asked for, and the operators that compute on them."""
    if request["quantize"] not in INTEGER_SCHEMES:
        return [], []
    tensors: list[str] = []
    operators: set[str] = set()
    for index, subgraph in enumerate(file.subgraphs):
        asked = {*subgraph.inputs, *subgraph.outputs} if index == 0 and request["input_dtype"] == "float32" else set()
        for operator in subgraph.operators:
            if kept.keys() & {subgraph.tensors[i].name for i in operator.outputs}:
                asked |= {*operator.inputs, *operator.outputs}
        left = {i for i, t in enumerate(subgraph.tensors) if t.dtype == "float32" and i not in asked}
        tensors += [subgraph.tensors[i].name for i in sorted(left)]
        operators |= {o.name for o in subgraph.operators if left & {*o.inputs, *o.outputs}}
    # The conversions around a float operator are there because of it; alone, they are all there is to name.
    return tensors, sorted(operators.difference(_IO_OPERATORS) or operators)


def _peak_memory_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Serve requests from standard input; answers go to what was standard output.

    TensorFlow's converter prints to standard output, so that descriptor is moved away and replaced by standard error.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        # Loaded while the parent still saves the first model.
        import_module("keras")
        import_module("tensorflow")

        def answer(message: dict[str, Any]) -> None:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

        serve(iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    main()
