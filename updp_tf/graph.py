"""Read a Keras model into a `ModelGraph`, run parts of it, and build a model from one again.

Nested models are flattened. The user's layers are never called symbolically: a rebuilt model is made of clones.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import keras
import numpy as np

from updp_tf import _keras
from updp_tf.errors import ModelError
from updp_tf.structure import ModelGraph, Node, Ref, Refusal, Shape, map_refs, refs_in


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
    return ModelGraph(model.name, tuple(reader.nodes), inputs, outputs, refused=tuple(reader.refused))


def read_calls(
    bound: Sequence[tuple[Any, Ref]], outputs: Sequence[Any], *, name_of: Callable[[Any], str], taken: set[str]
) -> tuple[tuple[Node, ...], tuple[Ref, ...]]:
    """Return the calls that lead to some symbolic tensors, as nodes of a larger graph.

    Args:
        bound: symbolic tensors that the calls start from, each with the tensor of the larger graph it stands for.
        outputs: symbolic tensors to read the way to.
        name_of: name for the node of an operation; made unique here.
        taken: names that are in use; the new ones are added.

    Returns:
        The nodes, and the tensors they write as outputs.
    """
    reader = _Reader(name_of, taken)
    reader.bind([tensor for tensor, _ in bound], [ref for _, ref in bound])
    reader.read(_keras.calls_between((tensor for tensor, _ in bound), outputs), prefix="")
    return tuple(reader.nodes), tuple(reader.ref(tensor) for tensor in outputs)


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
        if isinstance(model, keras.Sequential) and not model.built:
            raise ModelError(f"The Sequential model '{model.name}' is not built; give it a keras.Input first.")
        raise ModelError(_subclassed(model))
    return functional


def _subclassed(model: Any) -> str:
    shape = (model.get_build_config() or {}).get("input_shape")
    source = f"keras.Input({tuple(shape[1:])})" if isinstance(shape, tuple) and shape else "keras.Input(shape)"
    return (
        f"{_unreadable(model)} Rebuild it as a Functional model: inputs = {source}; "
        "keras.Model(inputs, model.call(inputs)) shares its layers and weights, wherever `call` uses Keras layers "
        "and keras.ops alone."
    )


def _unreadable(model: Any) -> str:
    held = [f"'{layer.name}' ({type(layer).__name__})" for layer in model.layers]
    listed = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
    return (
        f"'{model.name}' is a subclassed model: what {type(model).__qualname__}.call does between its layers "
        f"({listed or 'it has none'}) cannot be read."
    )


class _Reader:
    """Walks a model once, collecting nodes; tensors of all nesting levels share one table."""

    def __init__(self, name_of: Callable[[Any], str] | None = None, taken: set[str] | None = None) -> None:
        self.nodes: list[Node] = []
        self.refused: list[Refusal] = []
        self._name_of = name_of
        self._ref_by_tensor: dict[int, Ref] = {}
        self._names: set[str] = set() if taken is None else taken

    def bind(self, tensors: Sequence[Any], refs: Sequence[Ref]) -> None:
        for tensor, ref in zip(tensors, refs, strict=True):
            self._ref_by_tensor[id(tensor)] = ref

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
        self.read((call for call in _keras.calls(functional) if not call.is_input), prefix)
        return keras.tree.map_structure(self.ref, _keras.output_structure(functional))

    def ref(self, tensor: Any) -> Ref:
        return self._ref_by_tensor[id(tensor)]

    def read(self, calls: Iterable[_keras.Call], prefix: str) -> None:
        for call in calls:
            inner = _keras.as_functional(call.operation)
            if inner is None:
                self._read_call(call, prefix)
            else:
                self._read_nested(call, inner, prefix)

    def _read_call(self, call: _keras.Call, prefix: str) -> None:
        args, kwargs = self._as_data(call.args), self._as_data(call.kwargs)
        name = self._unique(prefix + call.operation.name if self._name_of is None else self._name_of(call.operation))
        shapes = tuple(tuple(tensor.shape) for tensor in call.outputs)
        dtypes = tuple(str(tensor.dtype) for tensor in call.outputs)
        kind = _keras.kind_of(type(call.operation))
        if isinstance(call.operation, keras.Model):
            kind_name = type(call.operation).__qualname__
            advice = f"updp_tf.register_expansion({kind_name}) takes `call` for what it is made of."
            self.refused.append(Refusal(name, "read", f"{_unreadable(call.operation)} {advice}"))
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
        self.bind(inner.inputs, outer_refs)
        results = refs_in(self.read_calls(inner, prefix=f"{prefix}{call.operation.name}_"))
        # A nested model may be called twice: its inner tensors mean another thing the next time.
        self._ref_by_tensor = before
        for tensor, ref in zip(call.outputs, results, strict=True):
            self._ref_by_tensor[id(tensor)] = ref

    def _as_data(self, value: Any) -> Any:
        def convert(item: Any) -> Any:
            return self.ref(item) if isinstance(item, keras.KerasTensor) else item

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
    if isinstance(layer, keras.layers.Lambda):
        # Its function is here already: nothing has to be deserialized, which Keras refuses for lambdas.
        output_shape = _keras.lambda_output_shape(layer)
        kept = {"mask": layer.mask, "arguments": dict(layer.arguments), "dtype": layer.dtype_policy}
        return type(layer)(layer.function, output_shape, name=name, **kept)
    try:
        config = layer.get_config()
        if "name" in config:  # some operations take none
            config["name"] = name
        return type(layer).from_config(config)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            f"'{layer.name}' ({type(layer).__name__}) cannot be copied from its own configuration: {error}"
        ) from error


def load_model(path: str | os.PathLike[str], *, like: Any) -> Any:
    """Return a model from a file that was saved of a network made of another one's layers.

    The other one's own classes are known to it. Functions in the file are refused by Keras' safe mode, but where the
    other one holds `Lambda` layers: Keras writes those as bytecode, and without them the network cannot be read.
    """
    kinds = {type(node.layer) for node in read_graph(like)}
    own = {kind.__name__: kind for kind in kinds if "." in _keras.kind_of(kind)}
    holds_code = any(issubclass(kind, keras.layers.Lambda) for kind in kinds)
    return keras.saving.load_model(path, custom_objects=own, safe_mode=not holds_code)


def clone_layer(layer: Any, name: str, *, input_shape: Shape, **changes: Any) -> Any:
    """Return a built copy of a layer with equal weights, under another name, its configuration changed where asked."""
    clone = type(layer).from_config({**layer.get_config(), "name": name, **changes}) if changes else _clone(layer, name)
    clone.build(input_shape)
    copy_variables(layer, clone)
    return clone


def copy_variables(source: Any, target: Any) -> None:
    """Copy every variable of one built layer to another of the same configuration."""
    for old, new in zip(source.variables, target.variables, strict=True):
        # Through a copy: on JAX both variables would hold one buffer, which a training step may use up only once.
        new.assign(np.array(keras.ops.convert_to_numpy(old)))
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
        if _takes_training(type(node.layer).call):
            # Explicitly: image augmentations take it for granted that they are called in training.
            node = replace(node, kwargs={**node.kwargs, "training": False})
        _store(values, node, _call(node.layer, node, values))


@cache
def _takes_training(call: Any) -> bool:
    return "training" in inspect.signature(call).parameters


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
        # The node's name stands for the layer's: layers inside other layers are numbered anew in every process.
        config.pop("name", None)
        config.pop("trainable", None)  # a teacher is frozen, and stays the same model
        args, kwargs = (map_refs(data, str) for data in (node.args, dict(node.kwargs)))
        add(node.name, node.kind, args, kwargs, node.shapes, config)
    add(map_refs(graph.inputs, str), map_refs(graph.outputs, str))
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Constants of operations as numbers, everything else by the name of its type: a repr may hold an address."""
    if isinstance(value, np.generic | np.ndarray) or keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value).tolist()
    if isinstance(value, slice):
        return ["slice", value.start, value.stop, value.step]
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
