"""The process that trains with fake quantization: tensorflow-model-optimization on tf_keras (Keras 2).

Importing tensorflow-model-optimization switches `tf.keras` for the whole process and its children, so it has one of its
own. `qat.py` is the other side: it leaves a folder with the network as data, and reads what this leaves there.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tflite_export._qat_network import quantized, rebuild

BRIDGE_TOLERANCE = 1e-5
_CALIBRATION_BATCH = 32


def main(folder: Path) -> None:
    """Rebuild the network, check it, quantize, calibrate, train, convert; leave "result.json" and what it names."""
    request = json.loads((folder / "request.json").read_text())
    weights = dict(np.load(folder / "weights.npz"))
    images = np.load(folder / "images.npy", mmap_mode="r")
    expected = np.load(folder / "expected.npy")
    import tensorflow as tf

    keras: Any = import_module("tf_keras")
    tfmot: Any = import_module("tensorflow_model_optimization")
    keras.utils.set_random_seed(request["seed"])
    float_model = rebuild(keras, request["nodes"], request["inputs"], request["output"], weights)
    found = _predict(float_model, images[: len(expected)])
    error = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30))
    answer: dict[str, Any] = {"bridge_error": error}
    if not error <= BRIDGE_TOLERANCE:
        _leave(
            folder, answer | {"error": f"the network rebuilt in Keras 2 differs by {error:.2g} of the largest output"}
        )
        return
    try:
        model = quantized(keras, tfmot, float_model)
    except (ValueError, RuntimeError) as problem:  # a layer that it has no scheme for
        cause = "".join(traceback.format_exception(problem))
        _leave(folder, answer | {"error": str(problem).splitlines()[0], "cause": cause})
        return
    teacher = _predict(float_model, images)
    n_held = max(1, len(images) // 10)
    with _ranges_as_seen():
        for start in range(n_held, len(images), _CALIBRATION_BATCH):
            model(np.asarray(images[start : start + _CALIBRATION_BATCH]), training=True)
    loss = _loss(tf, request["loss"])
    before = _held_out(model, loss, images[:n_held], teacher[:n_held])
    kept, best = model.get_weights(), before
    history = []
    for number, value in enumerate(_train(tf, keras, model, loss, images[n_held:], teacher[n_held:], request)):
        history.append(value)
        if (number + 1) % request["check_every"] == 0 or number + 1 == request["steps"]:
            now = _held_out(model, loss, images[:n_held], teacher[:n_held])
            print(json.dumps({"step": number + 1, "loss": value, "held_out": now}), flush=True)
            # What was trained is kept only where images that it did not see gain.
            if now < best:
                kept, best = model.get_weights(), now
    model.set_weights(kept)
    (folder / "model.tflite").write_bytes(_converted(tf, model, request))
    np.savez(folder / "trained.npz", **_trained_weights(model, request["nodes"]))
    # Pixels halfway between two steps of the input would be rounded up here and down there.
    probes = _predict(model.layers[1], images[: len(expected)])
    np.savez(folder / "fake.npz", probes=probes, fake=_predict(model, probes), exact=_predict(float_model, probes))
    np.savez(folder / "kernels.npz", **_rounded_kernels(model))
    np.save(folder / "ranges.npy", _ranges(model))
    answer |= {"loss_before": before, "loss_after": best, "last_losses": history[-5:]}
    _leave(folder, answer)


def _leave(folder: Path, answer: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(answer))


def _predict(model: Any, images: np.ndarray) -> np.ndarray:
    parts = [np.asarray(model(np.asarray(images[i : i + 32]), training=False)) for i in range(0, len(images), 32)]
    return np.concatenate(parts)


@contextmanager
def _ranges_as_seen() -> Iterator[None]:
    """While training, let ranges be the smallest and largest value of all batches.

    They begin at -6 and 6 and move by a thousandth a batch, which starts a MobileNetV2 at chance.
    """
    import tensorflow as tf

    module: Any = tf.__internal__.train
    seen: set[int] = set()

    def assign_extreme(variable: Any, value: Any, *_: Any, name: str = "", **__: Any) -> Any:
        if id(variable) in seen:
            value = (tf.minimum if "Min" in name else tf.maximum)(variable, value)
        seen.add(id(variable))
        variable.assign(value)
        return variable.read_value()

    original, module.assign_moving_average = module.assign_moving_average, assign_extreme
    try:
        yield
    finally:
        module.assign_moving_average = original


def _loss(tf: Any, kind: str) -> Callable[[Any, Any], Any]:
    def logs(outputs: Any) -> Any:
        if kind == "probabilities":
            return tf.math.log(tf.clip_by_value(outputs, 1e-7, 1.0))
        return tf.nn.log_softmax(outputs)

    def divergence(teacher: Any, outputs: Any) -> Any:
        wanted = logs(teacher)
        return tf.reduce_mean(tf.reduce_sum(tf.exp(wanted) * (wanted - logs(outputs)), axis=-1))

    def squares(teacher: Any, outputs: Any) -> Any:
        return tf.reduce_mean(tf.square(outputs - teacher)) / tf.reduce_mean(tf.square(teacher))

    return squares if kind == "values" else divergence


def _held_out(model: Any, loss: Callable[[Any, Any], Any], images: np.ndarray, teacher: np.ndarray) -> float:
    return float(loss(teacher, _predict(model, images)))


def _train(
    tf: Any,
    keras: Any,
    model: Any,
    loss: Callable[[Any, Any], Any],
    images: np.ndarray,
    teacher: np.ndarray,
    request: dict[str, Any],
) -> Iterator[float]:
    """Train to the teacher's outputs; yield the loss of each step."""
    rate = keras.optimizers.schedules.CosineDecay(request["learning_rate"], request["steps"])
    optimizer = keras.optimizers.Adam(rate)
    rng = np.random.default_rng(request["seed"])

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        optimizer.apply_gradients(
            [
                (gradient, variable)
                for gradient, variable in zip(
                    tape.gradient(value, model.trainable_variables), model.trainable_variables, strict=True
                )
                if gradient is not None
            ]
        )
        return value

    size = min(request["batch_size"], len(images))
    order = rng.permutation(len(images))
    for number in range(request["steps"]):
        first = number * size % len(images)
        if first + size > len(images):
            order, first = rng.permutation(len(images)), 0
        chosen = np.sort(order[first : first + size])
        yield float(step(np.asarray(images[chosen]), teacher[chosen]))


def _converted(tf: Any, model: Any, request: dict[str, Any]) -> bytes:
    """Return the int8 file, with one image at a time and the model's own names."""

    def call(image: Any) -> dict[str, Any]:
        return {request["output_name"]: model(image, training=False)}

    shape = (1, *model.input_shape[1:])
    spec = tf.TensorSpec(shape, tf.float32, name=request["input_name"])
    holder = tf.Module()
    holder.held_variables = model.variables
    function = tf.function(call, input_signature=[spec]).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.as_dtype(request["input_dtype"])
    return bytes(converter.convert())


def _rounded_kernels(model: Any) -> dict[str, Any]:
    """Return the kernels as the fake quantization rounds them, the channels they write as the last axis."""
    found = {}
    for wrapper in model.layers:
        for weight, quantizer, limits in getattr(wrapper, "_weight_vars", ()):
            kernel = np.asarray(quantizer(weight, training=False, weights=limits))
            is_depthwise = "depthwise" in weight.name
            found[wrapper.layer.name] = kernel.reshape(*kernel.shape[:2], -1) if is_depthwise else kernel
    return found


def _ranges(model: Any) -> np.ndarray:
    """Return the smallest and largest value of every tensor that is rounded, of shape (n, 2)."""
    values = {weight.name: weight.numpy() for weight in model.weights if weight.shape.rank == 0}
    starts = [name.removesuffix("min:0") for name in values if name.endswith("min:0")]
    return np.array([[values[f"{start}{end}:0"] for end in ("min", "max")] for start in starts])


def _trained_weights(model: Any, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the weights as they are before rounding, by the key that they came with."""
    keys = {node["layer"]: node["weights"] for node in nodes if node["weights"]}
    found: dict[str, Any] = {}
    for wrapper in model.layers:
        layer = getattr(wrapper, "layer", None)
        if layer is None or layer.name not in keys or type(layer).__name__ == "BatchNormalization":
            continue
        kernels = [variable for variable, *_ in wrapper._weight_vars]
        values = [*kernels[:1], *([layer.bias] if layer.use_bias else [])] if kernels else layer.trainable_weights
        found |= {key: value.numpy() for key, value in zip(keys[layer.name], values, strict=True)}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
