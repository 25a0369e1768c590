"""Learned search: how much of each form a network wants, by gradients, under a penalty for what the budget forbids.

Every block writes a mixture of what it writes and what its fitted forms write. The weights of the mixtures alone are
trained, on calibration images and without labels, to keep the original's outputs; the temperature falls, so that they
become choices. What was learned is then a score, and the solver makes a plan within the budget of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from updp_tf.blocks import Blocks
from updp_tf.compiling import jit_compile
from updp_tf.errors import BudgetError
from updp_tf.forms import Fitted
from updp_tf.graph import build_model
from updp_tf.judging import sum_to_one
from updp_tf.searching import Space
from updp_tf.supernet import distance, supergraph

COLDEST = 0.1
"""Temperature at the end of the training; it starts at 1."""

NEVER = -1e9  # weight, before the softmax, of an option that is not there


@dataclass(frozen=True)
class Learned:
    """Trainable blends of all forms with a budget penalty.

    Attributes:
        steps: of Adam.
        batch_size: of the calibration images.
        learning_rate: of Adam.
        penalty: times the relative excess over each limit, added to the loss.
        seed: of the batches.
    """

    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 0.1
    penalty: float = 10.0
    seed: int = 0
    name = "learned"
    measures = True

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"'{key}' of a search is a whole number, 1 or more. Received: {value!r}.")


def learn(
    space: Space, method: Learned, *, blocks: Blocks, fitted: Mapping[str, Fitted], images: np.ndarray
) -> dict[str, float]:
    """Return a score of every item of a space: how much more the network wants what was there.

    Args:
        space: of the choices within the budget.
        method: how long, and how.
        blocks: of the original.
        fitted: maps of every candidate, by `Candidate.key`.
        images: calibration images.
    """
    mixed = _Mixed(space, method, blocks, fitted, images)
    mixed.compile(keras.optimizers.Adam(method.learning_rate), jit_compile=jit_compile())
    mixed.fit(_Batches(images, method), epochs=1, verbose=0, shuffle=False)
    wants = np.asarray(ops.convert_to_numpy(mixed.theta), dtype=np.float64)
    return {key: float(wants[place, 0] - wants[place, number]) for key, (place, number) in mixed.places.items()}


class _Batches(keras.utils.PyDataset):
    """Random batches, the same for the same seed."""

    def __init__(self, images: np.ndarray, method: Learned) -> None:
        super().__init__()
        rng = np.random.default_rng(method.seed)
        size = min(method.batch_size, len(images))
        self._images = images
        self._batches = [np.sort(rng.choice(len(images), size, replace=False)) for _ in range(method.steps)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Any]:
        return (np.asarray(self._images[self._batches[index]]),)


class _Mixed(keras.Model):
    """The network with a mixture behind each block; only the weights of the mixtures learn."""

    def __init__(
        self, space: Space, method: Learned, blocks: Blocks, fitted: Mapping[str, Fitted], images: np.ndarray
    ) -> None:
        super().__init__(name=f"{blocks.graph.name}_mixed")
        graph, sites = supergraph(blocks, space.items, fitted, mixed=True)
        self.core, self.teacher = build_model(graph), build_model(blocks.graph)
        self.teacher.trainable = False
        for variable in self.core.variables:
            # Not the layers: a norm that is not trainable would take its old statistics, which no mixture has.
            variable.trainable = False
        most = max(len(site.options) for site in sites)
        there = np.array([[number < len(site.options) for number in range(most)] for site in sites])
        self._absent = np.where(there, 0.0, NEVER).astype("float32")
        self.places = {
            one.key: (place, number)
            for place, site in enumerate(sites)
            for number, one in enumerate(site.options)
            if one is not None
        }
        # rows of the limits over the mixtures' weights
        self._rows = []
        for coefficients, lower, upper in space.limits:
            row = np.zeros(there.shape, dtype="float32")
            size = float(np.abs(coefficients).sum()) or 1.0
            for item, coefficient in zip(space.items, coefficients, strict=True):
                row[self.places[item.key]] = coefficient / size
            self._rows.append((row, lower / size, upper / size))
        outputs = keras.tree.flatten(self.teacher(np.asarray(images[:64]), training=False))
        written = [ops.convert_to_numpy(one) for one in outputs]
        self._scales = tuple(None if sum_to_one(one) else float(one.var()) or 1.0 for one in written)
        self._steps, self._penalty = method.steps, method.penalty
        # what was there begins with a half, its forms share the other
        begin = np.zeros(there.shape, dtype="float32")
        begin[:, 0] = np.log(np.maximum(there.sum(axis=1) - 1, 1))
        self.theta = self.add_weight(
            name="theta", shape=begin.shape, initializer=lambda shape, dtype=None: ops.convert_to_tensor(begin)
        )
        self.step = self.add_weight(name="step", shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.built = True

    def _weights(self) -> Any:
        done = ops.cast(self.step, "float32") / self._steps
        return ops.softmax((self.theta + self._absent) / ops.power(COLDEST, done), axis=-1)

    def call(self, x: Any, training: Any = None) -> Any:
        """Return what the mixtures write, with norms by batch."""
        return self.core([x, self._weights()], training=True)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return how far the outputs are from the original's, and the penalty; the step advances."""
        weights = self._weights()
        pairs = zip(
            keras.tree.flatten(self.teacher(x, training=False)), keras.tree.flatten(y_pred), self._scales, strict=True
        )
        loss = sum(distance(ops.stop_gradient(a), b, scale) for a, b, scale in pairs)
        for row, lower, upper in self._rows:
            value = ops.sum(weights * row)
            if np.isfinite(upper):
                loss = loss + self._penalty * ops.relu(value - upper)
            if np.isfinite(lower):
                loss = loss + self._penalty * ops.relu(lower - value)
        self.step.assign(self.step + 1)
        return loss
