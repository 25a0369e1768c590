"""Read a Keras model into a `ModelGraph`, run parts of it, and build a model from one again.

Nested models are flattened. The user's layers are never called symbolically: a rebuilt model is made of clones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from updp_tf import _keras
from updp_tf.errors import ModelError
from updp_tf.structure import ModelGraph, Node, Ref, Shape, map_refs, refs_in

_REBUILD = "Rebuild it as a Functional model: outputs = your_calls(inputs); keras.Model(inputs, outputs)."


def read_graph(model: Any) -> ModelGraph:
    """Return the calls of a Functional or Sequential model, nested models flattened.

    Args:
        model: a built Keras 3 model.

    Raises:
        ModelError: the model is subclassed, not built, or of another Keras.
    """
    functional = _functional_or_raise(model)
    reader = _Reader()
    inputs = reader.read_inputs(functional)
    outputs = reader.read_calls(functional, prefix="")
    return ModelGraph(name=model.name, nodes=tuple(reader.nodes), inputs=inputs, outputs=outputs)


def _functional_or_raise(model: Any) -> Any:
    if not isinstance(model, keras.Model):
        family = type(model).__module__.partition(".")[0]
        if family == "tf_keras":
            raise ModelError(
                "The model is a tf_keras (Keras 2) model; save it as HDF5 or .keras and load it with Keras 3 "
                "(keras.models.load_model), or rebuild it with `import keras`."
            )
        raise ModelError(f"Expected a keras.Model. Received: {type(model).__module__}.{type(model).__name__}")
    functional = _keras.as_functional(model)
    if functional is None:
        if isinstance(model, keras.Sequential):
            raise ModelError(f"The Sequential model '{model.name}' is not built; give it a keras.Input first.")
        raise ModelError(f"'{model.name}' is a subclassed model, whose calls cannot be read. {_REBUILD}")
    return functional


class _Reader:
    """Walks a model once, collecting nodes; tensors of all nesting levels share one table."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._ref_by_tensor: dict[int, Ref] = {}
        self._names: set[str] = set()

    def read_inputs(self, functional: Any) -> Any:
        return keras.tree.map_structure(self._read_input, _keras.input_structure(functional))

    def _read_input(self, tensor: Any) -> Ref:
        # Two inputs may not share a layer, so the layer's name names the input.
        layer = _keras.producer(tensor)
        node = Node(self._unique(layer.name), layer, "InputLayer", (), {}, (tuple(tensor.shape),), (tensor.dtype,))
        self.nodes.append(node)
        self._ref_by_tensor[id(tensor)] = Ref(node.name)
        return Ref(node.name)

    def read_calls(self, functional: Any, prefix: str) -> Any:
        for call in _keras.calls(functional):
            if call.is_input:
                continue
            inner = _keras.as_functional(call.operation)
            if inner is None:
                self._read_call(call, prefix)
            else:
                self._read_nested(call, inner, prefix)
        return keras.tree.map_structure(
            lambda tensor: self._ref_by_tensor[id(tensor)], _keras.output_structure(functional)
        )

    def _read_call(self, call: _keras.Call, prefix: str) -> None:
        args, kwargs = self._as_data(call.args), self._as_data(call.kwargs)
        name = self._unique(prefix + call.operation.name)
        shapes = tuple(tuple(tensor.shape) for tensor in call.outputs)
        dtypes = tuple(str(tensor.dtype) for tensor in call.outputs)
        kind = type(call.operation).__name__
        self.nodes.append(Node(name, call.operation, kind, args, kwargs, shapes, dtypes))
        for index, tensor in enumerate(call.outputs):
            self._ref_by_tensor[id(tensor)] = Ref(name, index)

    def _read_nested(self, call: _keras.Call, inner: Any, prefix: str) -> None:
        outer_refs = refs_in((self._as_data(call.args), self._as_data(call.kwargs)))
        if len(outer_refs) != len(inner.inputs):
            raise ModelError(
                f"The nested model '{call.operation.name}' has {len(inner.inputs)} inputs and is called with "
                f"{len(outer_refs)} tensors; call it with exactly its inputs."
            )
        before = dict(self._ref_by_tensor)
        for tensor, ref in zip(inner.inputs, outer_refs, strict=True):
            self._ref_by_tensor[id(tensor)] = ref
        results = refs_in(self.read_calls(inner, prefix=f"{prefix}{call.operation.name}_"))
        # A nested model may be called twice: its inner tensors mean another thing the next time.
        self._ref_by_tensor = before
        for tensor, ref in zip(call.outputs, results, strict=True):
            self._ref_by_tensor[id(tensor)] = ref

    def _as_data(self, value: Any) -> Any:
        def convert(item: Any) -> Any:
            return self._ref_by_tensor[id(item)] if isinstance(item, keras.KerasTensor) else item

        return keras.tree.map_structure(convert, value)

    def _unique(self, name: str) -> str:
        candidate, n = name, 1
        while candidate in self._names:
            candidate, n = f"{name}_call{n}", n + 1
        self._names.add(candidate)
        return candidate


def build_model(graph: ModelGraph, *, name: str | None = None) -> Any:
    """Return a Keras model that makes the graph's calls, with clones of its layers and equal weights.

    A layer that several nodes share is cloned once. Layers of nested models get their outer model's name in front,
    since names must be unique.
    """
    values: dict[Ref, Any] = {}
    clones: dict[int, Any] = {}
    taken: set[str] = set()
    for node in graph:
        if node.is_input:
            # Not `node.layer`: an Input's tensor would belong to both models.
            values[Ref(node.name)] = keras.Input(
                batch_shape=node.shapes[0], dtype=node.dtypes[0], name=_layer_name(node, taken)
            )
            continue
        clone = clones.get(id(node.layer))
        if clone is None:
            clone = clones[id(node.layer)] = _clone(node.layer, _layer_name(node, taken))
        _store(values, node, _call(clone, node, values))
    for node in graph:
        if not node.is_input and isinstance(node.layer, keras.layers.Layer):
            copy_variables(node.layer, clones[id(node.layer)])
    inputs = map_refs(graph.inputs, values.__getitem__)
    outputs = map_refs(graph.outputs, values.__getitem__)
    return keras.Model(inputs, outputs, name=name or graph.name)


def _layer_name(node: Node, taken: set[str]) -> str:
    name = node.name
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _clone(layer: Any, name: str) -> Any:
    try:
        config = layer.get_config()
        if "name" in config:  # some operations take none
            config["name"] = name
        return type(layer).from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"'{layer.name}' ({type(layer).__name__}) cannot be copied from its own configuration: {error}"
        ) from error


def clone_layer(layer: Any, name: str, *, input_shape: Shape) -> Any:
    """Return a built copy of a layer with equal weights, under another name."""
    clone = _clone(layer, name)
    clone.build(input_shape)
    copy_variables(layer, clone)
    return clone


def copy_variables(source: Any, target: Any) -> None:
    """Copy every variable of one built layer to another of the same configuration."""
    for old, new in zip(source.variables, target.variables, strict=True):
        new.assign(old)
    if hasattr(target, "finalize_state"):
        # Normalization computes what it applies from its variables, once.
        target.finalize_state()


def _call(layer: Any, node: Node, values: MutableMapping[Ref, Any]) -> Any:
    args = map_refs(node.args, values.__getitem__)
    kwargs = map_refs(dict(node.kwargs), values.__getitem__)
    return layer(*args, **kwargs)


def _store(values: MutableMapping[Ref, Any], node: Node, result: Any) -> None:
    for index, tensor in enumerate(keras.tree.flatten(result)):
        values[Ref(node.name, index)] = tensor


def run_nodes(nodes: Iterable[Node], values: MutableMapping[Ref, Any]) -> None:
    """Run calls eagerly in inference mode, reading tensors from `values` and adding the results to it.

    The layers of the nodes themselves are run, on arrays: this records nothing on them. A recorded `training=True` is
    overruled, as `model(x, training=False)` and `model.predict` do.
    """
    for node in nodes:
        if node.is_input:
            continue
        if node.kwargs.get("training"):
            node = replace(node, kwargs={**node.kwargs, "training": False})
        _store(values, node, _call(node.layer, node, values))


def split_activations(graph: ModelGraph, *, kinds: Iterable[str]) -> ModelGraph:
    """Return the graph with the activation of each layer of `kinds` as a call of its own.

    Blocks end before an activation, so a layer that applies one itself has to be two calls. Layers that write an
    output of the model stay whole (a classifier keeps its softmax), in every call of theirs: what is shared stays so.
    Outputs are equal bit for bit.
    """
    wanted = set(kinds)
    whole = {id(graph.by_name[ref.node].layer) for ref in graph.output_refs}
    linear = keras.activations.linear
    taken = set(graph.by_name)
    split_layers: dict[int, Any] = {}
    nodes: list[Node] = []
    renamed: dict[Ref, Ref] = {}

    def current(data: Any) -> Any:
        return map_refs(data, lambda ref: renamed.get(ref, ref))

    for node in graph:
        node = replace(node, args=current(node.args), kwargs=current(dict(node.kwargs)))
        activation = getattr(node.layer, "activation", None)
        if node.kind not in wanted or id(node.layer) in whole or activation in (None, linear):
            nodes.append(node)
            continue
        layer = split_layers.get(id(node.layer))
        if layer is None:
            layer = split_layers[id(node.layer)] = _without_activation(node.layer)
        name = f"{node.name}_activation"
        while name in taken:
            name += "_"
        taken.add(name)
        after = keras.layers.Activation(activation, name=name, dtype=node.layer.dtype_policy)
        nodes.append(replace(node, layer=layer))
        nodes.append(
            Node(after.name, after, "Activation", (Ref(node.name),), {}, node.shapes, node.dtypes),
        )
        renamed[Ref(node.name)] = Ref(after.name)
    return replace(graph, nodes=tuple(nodes), outputs=current(graph.outputs))


def _without_activation(layer: Any) -> Any:
    config = layer.get_config()
    config["activation"] = None
    clone = type(layer).from_config(config)
    clone.build(layer.get_build_config()["input_shape"])
    copy_variables(layer, clone)
    return clone


def fingerprint(graph: ModelGraph) -> str:
    """Return a hash of a graph's calls and configurations: equal for equal models, in any process."""
    digest = hashlib.sha256()

    def add(*fields: Any) -> None:
        digest.update(json.dumps(fields, sort_keys=True, default=_as_json).encode())

    for node in graph:
        config = {} if node.is_input else node.layer.get_config()
        args, kwargs = (map_refs(data, str) for data in (node.args, dict(node.kwargs)))
        add(node.name, node.kind, args, kwargs, node.shapes, config)
    add(map_refs(graph.inputs, str), map_refs(graph.outputs, str))
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Constants of operations as numbers, everything else by the name of its type: a repr may hold an address."""
    if isinstance(value, np.generic | np.ndarray) or keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value).tolist()
    return type(value).__name__


def weights_hash(graph: ModelGraph) -> str:
    """Return a hash of all weights of a graph's layers."""
    digest = hashlib.sha256()
    for node in graph:
        for variable in getattr(node.layer, "weights", ()):
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return digest.hexdigest()


def n_elements(shape: Shape) -> int:
    """Elements of one image's tensor; a dynamic axis counts as 1."""
    return int(np.prod([axis or 1 for axis in shape[1:]], dtype=np.int64))
