"""Sums of gradients over images, on every Keras backend: an optimizer that records and changes nothing.

Keras has no public way to ask for gradients, but its trainers compute them on TensorFlow, JAX and torch alike, and
hand them to the optimizer. The network runs in inference mode inside the training step, so that norms use the
statistics they have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from updp_tf.compiling import jit_compile
from updp_tf.errors import CalibrationError, ModelError
from updp_tf.graph import build_model
from updp_tf.isomorphic.importance import weighted_layers
from updp_tf.memory import image_batches
from updp_tf.structure import ModelGraph
from updp_tf.walking import Progress

BATCH = 32
"""Images whose gradients are summed at a time for first-order scores; second-order ones take them one by one."""

NOISE = 1.0
"""Spread of the targets around outputs that are no class scores."""


class _GradientSums(keras.optimizers.Optimizer):
    """Adds up gradients and their squares in place of a step."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.0, name="gradient_sums")
        self.sums: list[Any] = []
        self.squares: list[Any] = []

    def build(self, variables: list[Any]) -> None:
        if self.built:
            return
        super().build(variables)
        self.sums = [self.add_variable_from_reference(one, "sum") for one in variables]
        self.squares = [self.add_variable_from_reference(one, "square") for one in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        gradient = keras.ops.cast(gradient, self.sums[index].dtype)
        self.assign_add(self.sums[index], gradient)
        self.assign_add(self.squares[index], keras.ops.square(gradient))


class _AtInference(keras.Model):
    """A model that ignores that it is being trained."""

    def __init__(self, inner: Any) -> None:
        super().__init__(name="at_inference")
        self.inner = inner

    def call(self, inputs: Any, training: Any = None) -> Any:
        return self.inner(inputs, training=False)


def gradient_statistics(
    graph: ModelGraph, kind: str, images: Any, labels: Any, loss: Any, *, seed: int, progress: Progress | None = None
) -> dict[int, dict[int, np.ndarray]]:
    """Return sums (`taylor`) or mean squares per image (`hessian`) of the gradients of every weight.

    Without labels, the network's own answers stand for them. The gradient of the divergence from itself is exactly
    zero, so a class is taken instead: the likeliest for `taylor`; drawn from the network's own probabilities for
    `hessian`, which makes the mean square the Hessian's diagonal of that very divergence (Fisher's information).
    Outputs that are no probabilities are compared with themselves plus noise, in the same way.

    Args:
        graph: of the network; its layers are not changed.
        kind: `taylor` or `hessian`.
        images: calibration data.
        labels: one per image, or None.
        loss: that goes with the labels; None without them.
        seed: of the drawn answers.
        progress: called after each gradient.

    Returns:
        By `id(layer)` of the graph's layers and index of the variable.

    Raises:
        CalibrationError: no images, or another number of labels.
        ModelError: a gradient is NaN or infinite; the message names the layer.
    """
    if images is None:
        raise CalibrationError(f"importance='{kind}' needs calibration images.")
    if len(graph.input_refs) != 1 or len(graph.output_refs) != 1:
        raise CalibrationError(f"'{graph.name}' needs one input and one output for gradients by calibration images.")
    model = build_model(graph)
    for layer in model.layers:
        layer.trainable = True  # a frozen layer has weights that matter, too
    whole = np.concatenate(list(image_batches(images, shape=graph.shape(graph.input_refs[0]))))
    if labels is None:
        outputs = [keras.ops.convert_to_numpy(model(batch, training=False)) for batch in _batches(whole, BATCH)]
        answers = np.concatenate(outputs).astype(np.float64)
        targets, loss = _own_answers(answers, np.random.default_rng(seed), sample=kind == "hessian")
    elif len(labels) == len(whole):
        targets = np.asarray(labels)
    else:
        raise CalibrationError(f"There are {len(whole)} calibration images and {len(labels)} labels.")
    size = BATCH if kind == "taylor" else 1
    optimizer = _GradientSums()
    recorder = _AtInference(model)
    recorder.compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile())
    least = _least_batch(model)
    pairs = zip(_batches(whole, size), _batches(targets, size), strict=True)
    for number, (batch, wanted) in enumerate(pairs, start=1):
        copies = -(-least // len(batch))  # the gradient of a mean over copies is the same
        recorder.train_on_batch(*(np.concatenate([one] * copies) for one in (batch, wanted)))
        if progress is not None:
            progress(number, -(-len(whole) // size), "gradients")
    recorded, n = (optimizer.sums, 1) if kind == "taylor" else (optimizer.squares, len(whole))
    by_path = {
        variable.path: np.asarray(keras.ops.convert_to_numpy(one), dtype=np.float64) / n
        for variable, one in zip(recorder.trainable_variables, recorded, strict=True)
    }
    return _by_layer(graph, model, by_path)


def _by_layer(graph: ModelGraph, model: Any, by_path: dict[str, np.ndarray]) -> dict[int, dict[int, np.ndarray]]:
    found: dict[int, dict[int, np.ndarray]] = {}
    for key, node in weighted_layers(graph).items():
        clone = model.get_layer(node.name)
        found[key] = {}
        for index, variable in enumerate(clone.variables):
            if (gradient := by_path.get(variable.path)) is None:
                continue
            if not np.isfinite(gradient).all():
                raise ModelError(f"The gradients of '{node.name}' are NaN or infinite on the calibration images.")
            found[key][index] = gradient
    return found


def _least_batch(model: Any) -> int:
    """Return how many images a batch needs, for the gradient not to write where it must not.

    On a CPU, oneDNN (TensorFlow 2.21) overruns its memory in the gradient of the kernel of a strided 1x1 convolution of
    8 channels or fewer, if there are more threads than images; the process crashes, at once or later.
    """
    overruns = any(
        isinstance(layer, keras.layers.Conv2D)
        and tuple(layer.kernel_size) == (1, 1)
        and max(layer.strides) > 1
        and layer.kernel.shape[2] <= 8
        for layer in model.layers
    )
    return (os.cpu_count() or 1) if overruns else 1


def _batches(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (array[start : start + size] for start in range(0, len(array), size))


def _own_answers(outputs: np.ndarray, rng: np.random.Generator, *, sample: bool) -> tuple[np.ndarray, str]:
    if outputs.ndim == 2 and (outputs >= 0).all() and np.allclose(outputs.sum(axis=-1), 1.0, atol=1e-3):
        if not sample:
            return outputs.argmax(axis=-1), "sparse_categorical_crossentropy"
        below = rng.random((len(outputs), 1)) > np.cumsum(outputs, axis=-1)
        return np.minimum(below.sum(axis=-1), outputs.shape[-1] - 1), "sparse_categorical_crossentropy"
    return (outputs + NOISE * rng.normal(size=outputs.shape)).astype("float32"), "mean_squared_error"
