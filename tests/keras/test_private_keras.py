"""What each private attribute of Keras that `updp_tf/_keras.py` reads is: a Keras that changes it fails here."""

from __future__ import annotations

import ast
from pathlib import Path

import keras
import pytest
from keras import layers

import updp_tf
from tests import zoo
from updp_tf import _keras

PINNED = {
    "_functional",
    "_nodes_by_depth",
    "_inputs_struct",
    "_outputs_struct",
    "_keras_history",
    "_inbound_nodes",
    "_outbound_nodes",
    "_flatten_layers",
    "_output_shape",
}


@pytest.fixture
def model() -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    inputs = {"b": keras.Input((4,), name="b"), "a": keras.Input((4,), name="a")}
    dense = layers.Dense(4, name="dense")
    x = layers.Add(name="add")([dense(inputs["b"]), dense(inputs["a"])])
    return keras.Model(inputs, [x, {"y": dense(x)}])


def test_every_private_attribute_has_a_test() -> None:
    package = Path(updp_tf.__file__).parent
    used = {}
    for path in package.glob("*.py"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "keras"))
        }
        used[path.name] = names & set(dir(keras.Model)) | names & PINNED
    assert used.pop("_keras.py") <= PINNED
    # hasattr(model, "_nodes_by_depth") and the like are in `_keras.py` alone
    assert not any(used.values()), used
    text = {path.name for path in package.glob("*.py") if any(f'"{name}"' in path.read_text() for name in PINNED)}
    assert text == {"_keras.py"}


def test_functional_of_a_sequential() -> None:
    empty = keras.Sequential([layers.Dense(2)])
    assert empty._functional is None and _keras.as_functional(empty) is None
    built = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    assert isinstance(built._functional, keras.Model) and _keras.as_functional(built) is built._functional
    assert [layer.name for layer in built._functional.layers][1:] == [layer.name for layer in built.layers]


def test_nodes_by_depth(model: keras.Model) -> None:
    assert _keras.as_functional(model) is model
    assert not hasattr(zoo.subclassed(), "_nodes_by_depth") and _keras.as_functional(zoo.subclassed()) is None
    # Depth 0 writes the outputs; every node stands at a greater depth than those that read it.
    depth_by_tensor = {
        id(tensor): depth for depth, nodes in model._nodes_by_depth.items() for node in nodes for tensor in node.outputs
    }
    assert depth_by_tensor[id(model.outputs[1])] == 0
    for depth, nodes in model._nodes_by_depth.items():
        for node in nodes:
            assert all(depth_by_tensor[id(tensor)] > depth for tensor in node.arguments.keras_tensors)
            assert isinstance(node.arguments.args, tuple) and isinstance(node.arguments.kwargs, dict)
            assert isinstance(node.operation, keras.Operation)
            assert node.is_input == isinstance(node.operation, layers.InputLayer)
    assert [call.operation.name for call in _keras.calls(model) if not call.is_input] == [
        "dense",
        "dense",
        "add",
        "dense",
    ]


def test_calls_of_other_models_are_not_among_them(model: keras.Model) -> None:
    n = len(list(_keras.calls(model)))
    model.get_layer("dense")(keras.Input((4,)))
    assert len(list(_keras.calls(model))) == n == 6


def test_structures_of_inputs_and_outputs(model: keras.Model) -> None:
    assert list(_keras.input_structure(model)) == ["b", "a"]
    assert _keras.input_structure(model)["b"] is next(t for t in model.inputs if t.name == "b")
    first, second = _keras.output_structure(model)
    assert first is model.outputs[0] and second["y"] is model.outputs[1]


def test_history_of_a_tensor(model: keras.Model) -> None:
    assert _keras.producer(model.outputs[0]) is model.get_layer("add")
    assert model.outputs[1]._keras_history.node_index == 2
    assert model.outputs[1]._keras_history.tensor_index == 0


def test_inbound_nodes_count_calls(model: keras.Model) -> None:
    assert _keras.n_calls(model.get_layer("dense")) == 3
    assert _keras.n_calls(layers.Dense(2)) == 0


def test_calls_between_tensors_need_no_unique_names() -> None:
    inputs = keras.Input((4,))
    x = layers.Dense(4, name="same")(inputs)
    y = layers.Dense(4, name="same")(x)
    z = layers.Add()([x, y])
    assert [call.operation.name for call in _keras.calls_between([inputs], [z])] == ["same", "same", "add"]
    assert [call.operation.name for call in _keras.calls_between([x], [y, z])] == ["same", "add"]
    assert list(_keras.calls_between([inputs], [inputs])) == []


def test_calls_are_forgotten_on_a_layer_and_the_layers_inside(model: keras.Model) -> None:
    class Pair(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.first = layers.Dense(4)
            self.others = [keras.Sequential([keras.Input((4,)), layers.Dense(4)])]

        def call(self, x):
            return self.others[0](self.first(x))

    pair = Pair()
    pair(model.outputs[0])
    held = [pair, pair.first, pair.others[0], pair.others[0].layers[0], model.get_layer("add")]
    before = [(len(one._inbound_nodes), len(one._outbound_nodes)) for one in held]
    with _keras.calls_forgotten(pair):
        pair.call(pair.first(keras.Input((4,))))
        assert len(pair.first._inbound_nodes) == before[1][0] + 2
    assert [(len(one._inbound_nodes), len(one._outbound_nodes)) for one in held] == before


def test_output_shape_of_a_lambda() -> None:
    layer = layers.Lambda(lambda x: x, output_shape=(3,))
    assert layer._output_shape == (3,) == _keras.lambda_output_shape(layer)


def test_a_model_with_a_call_of_its_own_is_not_functional() -> None:
    class Doubled(keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    class Sequence(keras.Sequential):
        def call(self, x):
            return 2 * super().call(x)

    class Named(keras.Model):
        pass

    inputs = keras.Input((4,))
    outputs = layers.Dense(2)(inputs)
    assert _keras.as_functional(Doubled(inputs, outputs)) is None
    assert _keras.as_functional(Sequence([inputs, layers.Dense(2)])) is None
    assert _keras.as_functional(Named(inputs, outputs)) is not None


def test_kinds_of_others_have_their_module_in_front() -> None:
    class Dense(layers.Dense):
        pass

    assert _keras.kind_of(layers.Dense) == "Dense"
    assert _keras.kind_of(type(keras.Input((3,)) + 1.0)) == "KerasTensor"
    assert _keras.kind_of(Dense) == f"{__name__}.test_kinds_of_others_have_their_module_in_front.<locals>.Dense"
