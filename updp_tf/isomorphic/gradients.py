"""Sums of gradients over images, on every Keras backend: an optimizer that records and changes nothing.

Keras has no public way to ask for gradients, but its trainers compute them on TensorFlow, JAX and torch alike, and
hand them to the optimizer. The network runs in inference mode inside the training step, so that norms use the
statistics they have.
"""

from __future__ import annotations

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
    graph: ModelGraph, kind: str, images: Any, labels: Any, loss: Any, *, seed: int
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
    size = BATCH if kind == "taylor" else 1
    optimizer = _GradientSums()
    recorder = _AtInference(model)
    rng = np.random.default_rng(seed)
    n, loss_in_use = 0, loss
    for batch, given in _batches(graph, images, labels, size):
        targets = given
        if given is None:
            outputs = np.asarray(keras.ops.convert_to_numpy(model(batch, training=False)), dtype=np.float64)
            targets, loss_in_use = _own_answers(outputs, rng, sample=kind == "hessian")
        if n == 0:
            recorder.compile(optimizer=optimizer, loss=loss_in_use, jit_compile=jit_compile())
        recorder.train_on_batch(batch, targets)
        n += len(batch)
    recorded = optimizer.sums if kind == "taylor" else optimizer.squares
    by_path = {
        variable.path: np.asarray(keras.ops.convert_to_numpy(one), dtype=np.float64) / (1 if kind == "taylor" else n)
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


def _batches(graph: ModelGraph, images: Any, labels: Any, size: int) -> Iterator[tuple[np.ndarray, Any]]:
    shape = graph.shape(graph.input_refs[0])
    whole = np.concatenate(list(image_batches(images, shape=shape)))
    if labels is not None and len(labels) != len(whole):
        raise CalibrationError(f"There are {len(whole)} calibration images and {len(labels)} labels.")
    # a smaller last batch would be traced anew
    for start in range(0, len(whole), size):
        part = slice(start, start + size)
        yield whole[part], None if labels is None else np.asarray(labels)[part]


def _own_answers(outputs: np.ndarray, rng: np.random.Generator, *, sample: bool) -> tuple[np.ndarray, str]:
    if outputs.ndim == 2 and (outputs >= 0).all() and np.allclose(outputs.sum(axis=-1), 1.0, atol=1e-3):
        if not sample:
            return outputs.argmax(axis=-1), "sparse_categorical_crossentropy"
        below = rng.random((len(outputs), 1)) > np.cumsum(outputs, axis=-1)
        return np.minimum(below.sum(axis=-1), outputs.shape[-1] - 1), "sparse_categorical_crossentropy"
    return (outputs + NOISE * rng.normal(size=outputs.shape)).astype("float32"), "mean_squared_error"
