"""The only file that touches private attributes of Keras; tests/keras/test_private_keras.py pins each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


def kind_of(layer_type: type) -> str:
    """Return the class name of a stock Keras layer or operation, and the full name of any other class.

    So a class of somebody else's that happens to be called Conv2D is never taken for Keras' own.
    """
    if layer_type.__module__.partition(".")[0] == "keras":
        return layer_type.__name__
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def as_functional(model: Any) -> Any | None:
    """Return the Functional model behind `model` (itself, or a built Sequential's), or None for anything else.

    A model with a `call` of its own computes what that says, whatever calls it was built from.
    """
    if isinstance(model, keras.Sequential):
        return model._functional if _has_stock_call(model) else None
    if isinstance(model, keras.Model) and hasattr(model, "_nodes_by_depth") and _has_stock_call(model):
        return model
    return None


def _has_stock_call(model: Any) -> bool:
    definer = next(cls for cls in type(model).__mro__ if "call" in vars(cls))
    return definer.__module__.partition(".")[0] == "keras"


def calls(functional: Any) -> Iterator[Call]:
    """Yield the calls of a Functional model, each after the calls it reads.

    A layer's list of calls also holds those made by other models, so the model's own depth table is walked.
    """
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
            arguments = node.arguments
            yield Call(node.operation, arguments.args, arguments.kwargs, tuple(node.outputs), node.is_input)


def calls_between(inputs: Iterable[Any], outputs: Iterable[Any]) -> Iterator[Call]:
    """Yield the calls that lead from some symbolic tensors to others, each after the calls it reads.

    Without a model around them: a Functional model wants every layer's name to be unique.
    """
    done = {id(tensor) for tensor in inputs}
    for output in outputs:
        waiting = [output]
        while waiting:
            tensor = waiting[-1]
            if id(tensor) in done:
                waiting.pop()
                continue
            history = tensor._keras_history
            node = history.operation._inbound_nodes[history.node_index]
            missing = [one for one in node.arguments.keras_tensors if id(one) not in done]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            done |= {id(one) for one in node.outputs}
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


def layers_within(layer: Any) -> list[Any]:
    """A layer or model, and all layers inside it at any depth."""
    return [layer, *layer._flatten_layers(include_self=False)]


@contextmanager
def calls_forgotten(layer: Any) -> Iterator[None]:
    """Take back every call that is recorded meanwhile on a layer, the layers inside it, and those they read from."""
    holders = layers_within(layer)
    before = [(one, len(one._inbound_nodes), len(one._outbound_nodes)) for one in holders]
    try:
        yield
    finally:
        for one, n_inbound, n_outbound in before:
            del one._inbound_nodes[n_inbound:]
            del one._outbound_nodes[n_outbound:]


def lambda_output_shape(layer: Any) -> Any:
    """The `output_shape` that a Lambda layer was made with."""
    return layer._output_shape
