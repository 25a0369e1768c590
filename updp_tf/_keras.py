"""The only file that touches private attributes of Keras; tests/keras/test_private_keras.py pins each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras


@dataclass(frozen=True)
class Call:
    """One call in a Keras graph, with Keras' own symbolic tensors in it."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]
    is_input: bool


def as_functional(model: Any) -> Any | None:
    """Return the Functional model behind `model` (itself, or a built Sequential's), or None for anything else."""
    if isinstance(model, keras.Sequential):
        return model._functional
    if isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth"):
        return model
    return None


def calls(functional: Any) -> Iterator[Call]:
    """Yield the calls of a Functional model, each after the calls it reads.

    A layer's list of calls also holds those made by other models, so the model's own depth table is walked.
    """
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
            arguments = node.arguments
            yield Call(node.operation, arguments.args, arguments.kwargs, tuple(node.outputs), node.is_input)


def input_structure(functional: Any) -> Any:
    """The inputs of a Functional model, nested as it was built."""
    return functional._inputs_struct


def output_structure(functional: Any) -> Any:
    """The outputs of a Functional model, nested as it was built."""
    return functional._outputs_struct


def producer(tensor: Any) -> Any:
    """The layer or operation that wrote a symbolic tensor."""
    return tensor._keras_history.operation


def n_calls(layer: Any) -> int:
    """How often a layer was called symbolically, by any model."""
    return len(layer._inbound_nodes)
