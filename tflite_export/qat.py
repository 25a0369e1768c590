"""Quantization-aware training: a network learns to live with int8, from its own float outputs. Labels are not needed.

tensorflow-model-optimization knows Keras 2 alone and switches Keras for its whole process, so the training runs in a
process of its own (`_qat.py`), on the network rebuilt there from data and compared with this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export._converter import signature_names
from tflite_export.calibration import collect
from tflite_export.errors import DataError, ExportError, ModelError, OptionError
from tflite_export.files import check_target, place
from tflite_export.flatbuffer import read_constant, read_flatbuffer
from tflite_export.interpreter import TfliteRunner
from tflite_export.steps import Step
from tflite_export.worker import WorkerTracebackError, converter_environment

Progress = Callable[[int, int, str], None]

_N_PROBES = 16
_N_CHECKS = 10
_STEP_TOLERANCE = 0.01
_NOISE_TOLERANCE = 2.0
# Operators whose output has a step that LiteRT prescribes.
_FIXED_STEPS = ("LOGISTIC", "SOFTMAX", "TANH")
# The axes of a kernel in a file, in Keras' order.
_KERNEL_AXES = {"CONV_2D": (1, 2, 3, 0), "DEPTHWISE_CONV_2D": (0, 1, 2, 3), "FULLY_CONNECTED": (1, 0)}
_IO_TYPES = ("int8", "uint8", "float32")

_CONVOLUTION = ("kernel_size", "strides", "padding", "dilation_rate", "activation", "use_bias")
_CONFIG: dict[str, tuple[str, ...]] = {
    "Add": (),
    "AveragePooling2D": ("pool_size", "strides", "padding"),
    "Activation": ("activation",),
    "BatchNormalization": ("axis", "epsilon", "center", "scale"),
    "Concatenate": ("axis",),
    "Conv2D": ("filters", "groups", *_CONVOLUTION),
    "Dense": ("units", "activation", "use_bias"),
    "DepthwiseConv2D": ("depth_multiplier", *_CONVOLUTION),
    "Flatten": (),
    "GlobalAveragePooling2D": ("keepdims",),
    "LayerNormalization": (),
    "MaxPooling2D": ("pool_size", "strides", "padding"),
    "Multiply": (),
    "ReLU": ("max_value", "negative_slope", "threshold"),
    "Reshape": ("target_shape",),
    "Softmax": ("axis",),
    "UpSampling2D": ("size", "interpolation"),
    "ZeroPadding2D": ("padding",),
}
"""Kinds of layers that the quantizer knows, and the part of their configuration that says what they do."""
_HARD_SWISH = "hard_swish"  # Keras 2 has none: a layer of its own
_SILU = "silu"  # tfmot gives what it reads no range, which leaves it and the convolution before it in float
_ACTIVATIONS = {
    "linear": "linear",
    "relu": "relu",
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "silu": _SILU,
    "gelu": "gelu",
    "hard_silu": _HARD_SWISH,
}
"""Activations that the quantizer has a scheme for, and what they are called in Keras 2."""


@dataclass(frozen=True)
class QatResult:
    """What came of the training.

    Attributes:
        path: the int8 file.
        model: the network with the trained weights, in Keras 3, norms folded.
        size_bytes: of the file.
        operators: how often each operator occurs.
        loss_before: distance from the float network's outputs on held-out images, ranges calibrated, before training.
        loss_after: the same after; not above `loss_before`, since the best is kept, no training included.
        loss: what is measured: "probabilities" and "logits" by Kullback-Leibler divergence in nats, "values" by the
            squared error in parts of the squared outputs.
        bridge_error: largest difference of the network rebuilt in Keras 2, in parts of the largest output.
        file_error: largest difference of the file from the fake quantization it was trained with, the same way.
        steps: what was rewritten before.
    """

    path: Path
    model: Any
    size_bytes: int
    operators: dict[str, int]
    loss_before: float
    loss_after: float
    loss: str
    bridge_error: float
    file_error: float
    steps: tuple[Step, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record as values that `json.dump` takes, without the model."""
        fields = asdict(replace(self, model=None))
        fields.pop("model")
        return fields | {"path": str(self.path)}

    def __str__(self) -> str:
        return (
            f"{self.path}: int8 after quantization-aware training, {self.size_bytes:,} bytes, distance from the float "
            f"network on held-out images {self.loss_before:.3g} -> {self.loss_after:.3g} ({self.loss})"
        )


def quantize_aware(
    model: Any,
    path: str | Path,
    images: Any,
    *,
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 1e-5,
    limit: int = 5_000,
    input_dtype: str = "int8",
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> QatResult:
    """Train a network with fake quantization to its own float outputs, and write it as an int8 file.

    Its norms are folded first. The ranges of activations are those of the images before the first step. A tenth of the
    images is held out; the weights that come closest to the float network on them are kept.

    Args:
        model: a Functional or Sequential Keras 3 model with one input and one output; it is not changed.
        path: the file to write.
        images: what it is trained on, unlabelled, as the model takes them: as `calibration` of `export`.
        steps: of training.
        batch_size: images a step.
        learning_rate: of Adam, at the start; it falls to 0 by a cosine.
        limit: use at most this many images.
        input_dtype: type of inputs and outputs: "int8", "uint8" or "float32".
        seed: of the order of the images.
        force: whether an existing file is replaced.
        progress: called with (steps done, steps in all, what comes next).

    Raises:
        ModelError: a layer that the quantizer has no scheme for, by name, or several inputs or outputs.
        DataError: images that are missing, not finite, or of the wrong shape.
        OptionError: an option is out of range.
        ExportError: tensorflow-model-optimization is not installed, or the training or the file went wrong.
        OutputError: the file exists and `force` is not set, or it cannot be written.

    Example:
        >>> result = quantize_aware(model, "model.tflite", images)  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    _check_options(steps, batch_size, learning_rate, input_dtype)
    target = Path(path)
    check_target(target, force=force)
    from tflite_export.clean import Purpose, clean_model

    gathered = collect(images, limit)
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ModelError(f"model '{model.name}' has several inputs or outputs: training takes one of each.")
    (array,) = gathered.arrays
    if array.shape[1:] != tuple(model.inputs[0].shape[1:]) or len(array) < 2:
        raise DataError(f"the images have shape {array.shape}, but model '{model.name}' takes {model.inputs[0].shape}.")
    cleaned, done = clean_model(model, Purpose())
    with tempfile.TemporaryDirectory(prefix="tflite_export_") as name:
        folder = Path(name)
        request = _write_request(folder, model, cleaned, array) | {
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "input_dtype": input_dtype,
            "check_every": max(1, steps // _N_CHECKS),
            "seed": seed,
        }
        (folder / "request.json").write_text(json.dumps(request))
        answer = _run(folder, model.name, steps, progress)
        trained = _with_weights(cleaned, dict(np.load(folder / "trained.npz")))
        _check_steps(folder, model.name)
        file_error = _file_error(folder, model.name)
        place(folder / "model.tflite", target)
    file = read_flatbuffer(target)
    return QatResult(
        path=target,
        model=trained,
        size_bytes=file.size_bytes,
        operators=file.operator_counts,
        loss_before=answer["loss_before"],
        loss_after=answer["loss_after"],
        loss=request["loss"],
        bridge_error=answer["bridge_error"],
        file_error=file_error,
        steps=done,
    )


def _check_options(steps: int, batch_size: int, learning_rate: float, input_dtype: str) -> None:
    if steps < 1 or batch_size < 1 or not 0 < learning_rate < 1:
        raise OptionError(
            f"steps and batch_size must be at least 1 and learning_rate between 0 and 1, not {steps}, {batch_size} and "
            f"{learning_rate}."
        )
    if input_dtype not in _IO_TYPES:
        raise OptionError(f"input_dtype must be one of {_IO_TYPES}, not {input_dtype!r}.")
    missing = [name for name in ("tensorflow_model_optimization", "tf_keras") if find_spec(name) is None]
    if missing:
        raise ExportError(f"{' and '.join(missing)} not found: install updp-tf[qat].")


def _write_request(folder: Path, model: Any, cleaned: Any, images: np.ndarray) -> dict[str, Any]:
    """Leave the network as data, and its outputs to compare with."""
    import keras

    nodes, weights, output = _as_data(cleaned)
    np.savez(folder / "weights.npz", **weights)
    np.save(folder / "images.npy", images.astype(np.float32))
    probes = keras.ops.convert_to_tensor(images[:_N_PROBES].astype(np.float32))
    expected = keras.ops.convert_to_numpy(cleaned(probes, training=False))
    np.save(folder / "expected.npy", expected)
    names = [tensor._keras_history.operation.name for tensor in (model.inputs[0], model.outputs[0])]
    input_name, output_name = (signature_names([name])[0] for name in names)
    return {
        "nodes": nodes,
        "inputs": nodes[0]["name"],
        "output": output,
        "input_name": input_name,
        "output_name": output_name,
        "loss": _kind_of_output(expected),
    }


def _kind_of_output(outputs: np.ndarray) -> str:
    if outputs.ndim != 2 or outputs.shape[1] == 1:
        return "values"
    sums = outputs.sum(axis=1)
    return "probabilities" if outputs.min() >= 0 and np.allclose(sums, 1, atol=1e-3) else "logits"


def _as_data(model: Any) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Return the calls of a network as data, its weights by layer and number, and the name of its output.

    Raises:
        ModelError: a layer that the quantizer has no scheme for.
    """
    from updp_tf import rules
    from updp_tf.graph import read_graph

    graph = read_graph(model)
    renamed: dict[str, str] = {}
    nodes: list[dict[str, Any]] = []
    weights: dict[str, Any] = {}
    layer_names: dict[int, str] = {}
    for node in graph:
        read = [renamed.get(ref.node, ref.node) for ref in node.inputs]
        if node.is_input:
            nodes.append(
                {"name": node.name, "kind": node.kind, "shape": node.shapes[0][1:], "weights": [], "layer": node.name}
            )
            continue
        if rules.is_passive(node):
            renamed[node.name] = read[0]
            continue
        layer = layer_names.setdefault(id(node.layer), node.name)
        stored = node.layer.get_weights()
        weights |= {f"{layer}/{number}": value for number, value in enumerate(stored)}
        keys = [f"{layer}/{number}" for number in range(len(stored))]
        if node.kind == "LayerNormalization":
            nodes += _norm(node, layer, read[0], keys)
            continue
        config = dict(_config(node))
        written: dict[str, Any] = {"kind": node.kind, "config": config, "inputs": read, "weights": keys}
        activation = config.get("activation")
        if activation not in (_HARD_SWISH, _SILU):
            nodes.append(_call(node.name, layer, **written))
            continue
        (before,) = read
        if node.kind != "Activation":
            config["activation"] = "linear"
            before = f"{node.name}_linear"
            nodes.append(_call(before, layer, **written))
        if activation == _HARD_SWISH:
            nodes.append(_call(node.name, f"{layer}_{_HARD_SWISH}", kind="HardSwish", inputs=[before]))
            continue
        gate, sigmoid = f"{node.name}_sigmoid", {"activation": "sigmoid"}
        nodes.append(_call(gate, f"{layer}_sigmoid", kind="Activation", inputs=[before], config=sigmoid))
        nodes.append(_call(node.name, f"{layer}_{_SILU}", kind="Multiply", inputs=[before, gate]))
    (output,) = graph.output_refs
    return nodes, weights, renamed.get(output.node, output.node)


def _call(
    name: str,
    layer: str,
    *,
    kind: str,
    inputs: list[str],
    config: Mapping[str, Any] | None = None,
    weights: Sequence[str] = (),
) -> dict[str, Any]:
    """Return one call of a layer as data."""
    return {
        "name": name,
        "layer": layer,
        "kind": kind,
        "config": config or {},
        "inputs": inputs,
        "is_list": kind in ("Add", "Concatenate", "Multiply", "Subtract"),
        "weights": list(weights),
    }


def _norm(node: Any, layer: str, read: str, keys: list[str]) -> list[dict[str, Any]]:
    """Return a LayerNormalization over channels, operator by operator: each has a range of its own in integers.

    Raises:
        ModelError: it normalizes over other axes.
    """
    axis, rank = node.layer.axis, len(node.shapes[0])
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if [one % rank for one in axes] != [rank - 1]:
        raise ModelError(f"layer '{node.name}' normalizes over the axes {axes}: here it may over the last alone.")
    own = {part: f"{node.name}__{part}" for part in ("mean", "centred", "square", "variance", "offset", "root")}
    steps: list[dict[str, Any]] = [
        {"name": own["mean"], "kind": "ChannelMean", "inputs": [read]},
        {"name": own["centred"], "kind": "Subtract", "inputs": [read, own["mean"]]},
        {"name": own["square"], "kind": "Multiply", "inputs": [own["centred"], own["centred"]]},
        {"name": own["variance"], "kind": "ChannelMean", "inputs": [own["square"]]},
        {
            "name": own["offset"],
            "kind": "Offset",
            "inputs": [own["variance"]],
            "config": {"value": float(node.layer.epsilon)},
        },
        {"name": own["root"], "kind": "InverseRoot", "inputs": [own["offset"]]},
        {"name": f"{node.name}__normal", "kind": "Multiply", "inputs": [own["centred"], own["root"]]},
    ]
    for kind, is_there, key in (
        ("ChannelScale", node.layer.scale, keys[:1]),
        ("ChannelShift", node.layer.center, keys[-1:]),
    ):
        if is_there:
            read = steps[-1]["name"]
            steps.append({"name": f"{node.name}__{kind}", "kind": kind, "inputs": [read], "weights": key})
    steps[-1]["name"] = node.name
    # A layer that is called several times is one there, too: part by part.
    return [_call(layer=one["name"].replace(node.name, layer, 1), **one) for one in steps]


def _config(node: Any) -> Mapping[str, Any]:
    if node.kind not in _CONFIG:
        raise ModelError(
            f"layer '{node.name}' is a {node.kind}, which tensorflow-model-optimization has no scheme for: "
            f"export with quantize='int8' instead, or replace it (known: {', '.join(_CONFIG)})."
        )
    config = node.layer.get_config()
    if config.get("data_format", "channels_last") != "channels_last":
        raise ModelError(f"layer '{node.name}' is channels_first, which .tflite files are not.")
    kept = {key: config[key] for key in _CONFIG[node.kind]}
    if "activation" in kept:
        if kept["activation"] not in _ACTIVATIONS:
            raise ModelError(
                f"layer '{node.name}' applies '{kept['activation']}', which tensorflow-model-optimization has no "
                f"scheme for: known are {', '.join(_ACTIVATIONS)}."
            )
        kept["activation"] = _ACTIVATIONS[kept["activation"]]
    return kept


def _run(folder: Path, label: str, steps: int, progress: Progress | None) -> dict[str, Any]:
    """Run the process to its end and return what it left."""
    command = [sys.executable, "-P", "-m", "tflite_export._qat", str(folder)]
    environment = converter_environment() | {"TF_USE_LEGACY_KERAS": "1"}
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, encoding="utf-8"
        ) as process:
            try:
                for line in process.stdout or ():
                    if progress and line.startswith("{"):
                        told = json.loads(line)
                        progress(told["step"], steps, f"training '{label}', held-out distance {told['held_out']:.3g}")
            except BaseException:  # interrupted, or a callback that raised: nobody wants the rest
                process.kill()
                raise
        status = process.returncode
        log.seek(0)
        last = [line for line in log.read().decode("utf-8", errors="replace").splitlines() if line.strip()][-5:]
    if status or not (folder / "result.json").is_file():
        raise ExportError(
            f"training model '{label}' ended with status {status}; its last lines were:\n" + "\n".join(last)
        )
    answer = json.loads((folder / "result.json").read_text())
    if "error" in answer:
        cause = WorkerTracebackError(answer["cause"]) if "cause" in answer else None
        raise ModelError(f"model '{label}' cannot be trained with fake quantization: {answer['error']}.") from cause
    return answer


def _with_weights(model: Any, trained: Mapping[str, np.ndarray]) -> Any:
    """Return a copy of a network with other weights where there are any."""
    from updp_tf.graph import build_model, read_graph

    graph = read_graph(model)
    clone = build_model(graph)
    layers = {layer.name: layer for layer in clone.layers}
    for node in graph:
        stored = [trained[key] for key in sorted(trained) if key.rpartition("/")[0] == node.name]
        if stored:
            layers[node.name].set_weights(stored)
    return clone


def _check_steps(folder: Path, label: str) -> None:
    """Check that the file rounds what the training rounded: activations by the same steps, kernels to the same values.

    Raises:
        ExportError: it does not.
    """
    data = (folder / "model.tflite").read_bytes()
    graph = read_flatbuffer(data).subgraphs[0]
    lowest, highest = np.load(folder / "ranges.npy").T
    trained = (np.maximum(highest, 0) - np.minimum(lowest, 0)) / 255
    kernels = [_in_steps(kernel) for kernel in np.load(folder / "kernels.npz").values()]
    for operator in graph.operators:
        for made in (graph.tensors[index] for index in operator.outputs):
            is_own = made.dtype == "int8" and operator.name not in _FIXED_STEPS
            if is_own and not np.isclose(made.scales[0], trained, rtol=1e-4, atol=0).any():
                raise ExportError(_elsewhere(label, f"what {operator.name} writes is rounded in steps of another size"))
        if operator.name in _KERNEL_AXES:
            stored = graph.tensors[operator.inputs[1]]
            if not stored.scales:
                raise ExportError(_elsewhere(label, f"{operator.name} computes in float"))
            steps = np.reshape(stored.scales, [-1 if axis == stored.axis else 1 for axis in range(len(stored.shape))])
            real = read_constant(data, stored) * steps
            kernel = _in_steps(real.transpose(_KERNEL_AXES[operator.name]))
            rivals = [one.reshape(kernel.shape) for one in kernels if one.size == kernel.size]
            if not any(np.abs(kernel - one).max() <= _STEP_TOLERANCE for one in rivals):
                raise ExportError(_elsewhere(label, f"the kernel of {operator.name} has other values"))


def _in_steps(kernel: np.ndarray) -> np.ndarray:
    """Return a kernel in parts of the largest weight of each channel: norms that follow change nothing in it."""
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    return np.asarray(127 * kernel / np.maximum(largest, 1e-30))


def _elsewhere(label: str, what: str) -> str:
    return f"the int8 file of model '{label}' is not the network that was trained with fake quantization: {what}."


def _file_error(folder: Path, label: str) -> float:
    """Return how far the file is from the fake quantization that was trained.

    Where the two round one value in a thousand another way, a step of a deep layer becomes many behind it: what is
    allowed is what the rounding itself costs.

    Raises:
        ExportError: farther.
    """
    probes, fake, exact = np.load(folder / "fake.npz").values()
    runner = TfliteRunner(folder / "model.tflite")
    (found,) = runner.run(probes).values()
    (output,) = runner.model.outputs
    step = max(output.scales, default=0.0)
    if not _rms(found - fake) <= _NOISE_TOLERANCE * _rms(fake - exact) + step:
        error = _rms(found - fake) / max(_rms(fake), 1e-30)
        raise ExportError(_elsewhere(label, f"their outputs differ by {error:.2g} of their size"))
    return float(np.abs(found - fake).max() / max(float(np.abs(fake).max()), 1e-30))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
