"""Reading and rebuilding keeps every model of the zoo equal bit for bit, and leaves the original alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from updp_tf import _keras, rules
from updp_tf.errors import ModelError
from updp_tf.graph import (
    build_model,
    clone_layer,
    fingerprint,
    load_model,
    n_elements,
    read_graph,
    run_nodes,
    split_activations,
    weights_hash,
)
from updp_tf.structure import ModelGraph, Ref, map_refs

EVERYTHING = [*zoo.ZOO]
NESTED = ("nested", "doubly_nested", "nested_twice", "nested_many_outputs", "nested_operations", "training_flags")


def images(model: keras.Model):
    return zoo.inputs_of(model, n=1 if model.name == "fixed_batch" else 3)


def facts(model: keras.Model) -> list:
    """Weights and numbers of calls of every layer, nested ones too."""
    found = []
    for layer in model._flatten_layers():
        found.append((layer.name, _keras.n_calls(layer), [np.array(weight) for weight in layer.weights]))
    return found


def assert_same_facts(before: list, after: list) -> None:
    assert [one[:2] for one in before] == [one[:2] for one in after]
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old[2], new[2], strict=True):
            np.testing.assert_array_equal(a, b)


def assert_equal_outputs(model: keras.Model, other: keras.Model) -> None:
    x = images(model)
    wanted = zoo.outputs_of(model, x)
    assert all(np.isfinite(y).all() and y.std() > 0 for y in wanted)
    for have, want in zip(zoo.outputs_of(other, x), wanted, strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_rebuilt_model_is_equal_and_the_original_untouched(name: str) -> None:
    model = zoo.shared(name)
    before = facts(model)

    rebuilt = build_model(read_graph(model))

    assert_same_facts(before, facts(model))
    assert_equal_outputs(model, rebuilt)
    # Sharing is kept, and nothing is doubled.
    assert rebuilt.count_params() == model.count_params()
    assert {id(w) for w in rebuilt.weights}.isdisjoint(id(w) for w in model.weights)
    assert rebuilt.name == model.name


@pytest.mark.parametrize("name", EVERYTHING)
def test_split_activations_change_nothing(name: str) -> None:
    model = zoo.shared(name)
    before = facts(model)

    graph = split_activations(read_graph(model), kinds=rules.SPLITTABLE)

    rebuilt = build_model(graph)
    assert_same_facts(before, facts(model))
    assert_equal_outputs(model, rebuilt)
    assert rebuilt.count_params() == model.count_params()
    outputs = {ref.node for ref in graph.output_refs}
    for node in graph:
        if node.kind in rules.SPLITTABLE and node.name not in outputs and name != "shared_classifier":
            assert node.layer.activation is keras.activations.linear


def test_split_activations_split_what_there_is() -> None:
    graph = read_graph(zoo.shared("vgg"))
    split = split_activations(graph, kinds=rules.SPLITTABLE)
    # 4 convolutions and a hidden Dense; the classifier keeps its softmax.
    assert len(split.nodes) == len(graph.nodes) + 5
    assert sum(node.kind == "Activation" for node in split) == 5


def test_a_layer_that_writes_an_output_stays_whole_in_every_call() -> None:
    graph = split_activations(read_graph(zoo.shared("shared_classifier")), kinds=rules.SPLITTABLE)
    calls = [node for node in graph if node.kind == "Conv2D" and node.layer.activation is keras.activations.sigmoid]
    assert len(calls) == 2 and calls[0].layer is calls[1].layer


@pytest.mark.parametrize("name", ["residual", "operations", "nested_twice", "two_inputs_outputs", "half"])
def test_a_rebuilt_model_survives_saving(name: str, tmp_path: Path) -> None:
    model = zoo.shared(name)
    build_model(read_graph(model)).save(tmp_path / "m.keras")
    assert_equal_outputs(model, keras.models.load_model(tmp_path / "m.keras"))


def test_a_loaded_model_reads_as_the_saved_one(tmp_path: Path) -> None:
    model = zoo.shared("doubly_nested")
    model.save(tmp_path / "m.keras")
    loaded = read_graph(keras.models.load_model(tmp_path / "m.keras"))
    assert fingerprint(loaded) == fingerprint(read_graph(model))
    assert weights_hash(loaded) == weights_hash(read_graph(model))


@pytest.mark.parametrize("name", EVERYTHING)
def test_running_the_nodes_is_running_the_model(name: str) -> None:
    model = zoo.shared(name)
    before = facts(model)
    graph = read_graph(model)
    x = images(model)
    values: dict = {}
    for ref, array in zip(graph.input_refs, keras.tree.flatten(x), strict=True):
        values[ref] = keras.ops.convert_to_tensor(array)
    run_nodes(graph, values)
    for ref, want in zip(graph.output_refs, zoo.outputs_of(model, x), strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(values[ref]), want)
    assert_same_facts(before, facts(model))


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name not in NESTED and name != "sequential"])
def test_the_reader_agrees_with_the_calls_in_get_config(name: str) -> None:
    model = zoo.shared(name)
    graph = read_graph(model)
    number: dict[str, int] = {}
    calls: dict[str, list] = {}
    for node in graph:
        number[node.name] = len(calls.setdefault(node.layer.name, []))
        read = [[graph.by_name[r.node].layer.name, number[r.node], r.index] for r in node.inputs]
        calls[node.layer.name].append(read)

    def tensors(data) -> list:
        if isinstance(data, dict) and data.get("class_name") == "__keras_tensor__":
            return [list(data["config"]["keras_history"])]
        items = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ()
        return [found for item in items for found in tensors(item)]

    config = model.get_config()
    recorded = {one["name"]: [tensors(call) for call in one["inbound_nodes"]] or [[]] for one in config["layers"]}
    assert recorded == calls


def test_nodes_are_calls() -> None:
    graph = read_graph(zoo.shared("shared_layer"))
    calls = [node for node in graph if node.kind == "Conv2D" and node.layer.kernel_size == (3, 3)]
    twice = [node for node in calls if node.name not in graph.called_once]
    assert [node.name for node in twice] == [twice[0].name, f"{twice[0].name}_call1"]
    assert twice[0].layer is twice[1].layer


def test_a_model_that_shares_layers_with_another_has_its_own_calls_only() -> None:
    model = zoo.build("residual")
    n = len(read_graph(model).nodes)
    inputs = keras.Input((18, 18, 3))
    other = keras.Model(inputs, model(inputs))
    part = keras.Model(model.input, model.get_layer("add_1").output)
    assert len(read_graph(model).nodes) == n
    assert len(read_graph(other).nodes) == n
    assert len(read_graph(part).nodes) < n
    assert_equal_outputs(part, build_model(read_graph(part)))


def test_a_nested_model_may_be_called_on_what_its_own_input_becomes() -> None:
    """Its input tensor means one thing inside the call and another one outside."""
    inputs = keras.Input((9, 9, 4))
    inner = keras.Model(inputs, layers.Conv2D(4, 3, padding="same", activation="relu")(inputs), name="inner")
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    model = zoo.randomise(keras.Model(inputs, layers.Add()([inner(x), inputs])))
    assert_equal_outputs(model, build_model(read_graph(model)))


def test_a_part_between_two_tensors_can_be_read() -> None:
    model = zoo.shared("residual")
    part = keras.Model(model.get_layer("re_lu").output, model.get_layer("add_2").output)
    assert_equal_outputs(part, build_model(read_graph(part)))


# Fingerprints

FINGERPRINTED = ("residual", "doubly_nested", "operations", "half")


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "import json; from tests import zoo; from updp_tf.graph import fingerprint, read_graph, weights_hash\n"
        f"graphs = [read_graph(zoo.build(name)) for name in {FINGERPRINTED}]\n"
        "print(json.dumps([[fingerprint(g), weights_hash(g)] for g in graphs]))"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    there = json.loads(done.stdout.splitlines()[-1])
    here = [read_graph(zoo.build(name)) for name in FINGERPRINTED]
    assert there == [[fingerprint(graph), weights_hash(graph)] for graph in here]


def _small(*, constant: float = 2.0, filters: int = 4, swap: bool = False, activation: str = "relu") -> ModelGraph:
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(filters, 3, activation=activation)(inputs)
    first, second = x * constant, x + np.float32(1)
    return read_graph(keras.Model(inputs, [second, first] if swap else [first, second], name="m"))


def test_a_fingerprint_tells_models_apart() -> None:
    alike = {fingerprint(_small()), fingerprint(_small())}
    others = [_small(constant=3.0), _small(filters=5), _small(swap=True), _small(activation="tanh")]
    assert len(alike) == 1
    assert len(alike | {fingerprint(graph) for graph in others}) == 5


def test_weights_do_not_count_in_a_fingerprint_but_in_their_own_hash() -> None:
    one, two = (read_graph(zoo.build("plain", seed=seed)) for seed in (0, 1))
    assert fingerprint(one) == fingerprint(two)
    assert weights_hash(one) != weights_hash(two)


# Errors


def test_a_subclassed_model_is_refused() -> None:
    model = zoo.subclassed()
    with pytest.raises(ModelError) as caught:
        read_graph(model)
    assert str(caught.value) == (
        "'plain' is a subclassed model: what subclassed.<locals>.Plain.call does between its layers "
        f"('{model.conv.name}' (Conv2D)) cannot be read. Rebuild it as a Functional model: "
        "inputs = keras.Input((8, 8, 3)); keras.Model(inputs, model.call(inputs)) shares its layers and weights, "
        "wherever `call` uses Keras layers and keras.ops alone."
    )


def test_what_is_said_of_a_subclassed_model_works() -> None:
    model = zoo.subclassed()
    inputs = keras.Input((8, 8, 3))
    rebuilt = keras.Model(inputs, model.call(inputs))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(build_model(read_graph(rebuilt))(x), model(x))


def test_a_functional_model_with_a_call_of_its_own_is_refused() -> None:
    class Doubled(keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    inputs = keras.Input((8, 8, 3))
    with pytest.raises(ModelError, match="what .*Doubled.call does between its layers"):
        read_graph(Doubled(inputs, layers.Conv2D(4, 3)(inputs)))


def test_an_unbuilt_sequential_model_is_refused() -> None:
    with pytest.raises(ModelError, match="'s' is not built; give it a keras.Input first"):
        read_graph(keras.Sequential([layers.Dense(3)], name="s"))


def test_a_sequential_model_that_was_called_is_read() -> None:
    model = keras.Sequential([layers.Conv2D(4, 3), layers.ReLU()])
    x = np.ones((2, 8, 8, 3), "float32")
    want = model(x)
    np.testing.assert_array_equal(build_model(read_graph(model))(x), want)


def test_a_tf_keras_model_is_refused() -> None:
    model = type("Functional", (), {"__module__": "tf_keras.src.engine.functional", "name": "old"})()
    with pytest.raises(ModelError, match=r"tf_keras \(Keras 2\) model; save it"):
        read_graph(model)


@pytest.mark.parametrize("thing", [None, "model.keras", 3, np.zeros(3)])
def test_what_is_no_model_is_refused(thing) -> None:
    with pytest.raises(ModelError, match=f"Expected a keras.Model. Received: .*{type(thing).__name__}"):
        read_graph(thing)


def test_a_layer_is_no_model() -> None:
    with pytest.raises(ModelError, match="Expected a keras.Model. Received: keras.*Dense"):
        read_graph(layers.Dense(3))


def test_a_layer_that_cannot_be_copied_is_named() -> None:
    class Careless(layers.Layer):
        def __init__(self, function) -> None:
            super().__init__()
            self.function = function

        def call(self, x):
            return self.function(x)

    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, Careless(keras.ops.sin)(inputs))
    with pytest.raises(ModelError, match=r"'careless' \(Careless\) cannot be copied from its own configuration: "):
        build_model(read_graph(model))


def test_a_lambda_is_copied_with_its_function() -> None:
    inputs = keras.Input((8, 8, 3))
    lambdas = [
        layers.Lambda(lambda x: 2 * x, name="doubling"),
        layers.Lambda(lambda x, factor: factor * x[:, ::2], arguments={"factor": 3.0}, output_shape=(4, 8, 3)),
    ]
    x = inputs
    for layer in lambdas:
        x = layer(x)
    model = keras.Model(inputs, x)
    assert_equal_outputs(model, build_model(read_graph(model)))


# Pieces


def test_dicts_are_visited_in_the_order_of_keras() -> None:
    data = {"z": Ref("a"), "b": [Ref("c"), {"y": Ref("d"), "x": Ref("e")}]}
    seen: list[Ref] = []
    copied = map_refs(data, lambda ref: seen.append(ref) or str(ref))
    assert [str(ref) for ref in seen] == keras.tree.flatten(copied) == ["c", "e", "d", "a"]
    assert list(copied) == ["z", "b"]


def test_a_cloned_layer_is_equal_and_independent() -> None:
    model = zoo.shared("plain")
    norm = next(layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
    clone = clone_layer(norm, "other", input_shape=(None, 15, 17, 5))
    for a, b in zip(norm.weights, clone.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    before = np.array(norm.moving_mean)
    clone.moving_mean.assign(before + 1)
    np.testing.assert_array_equal(norm.moving_mean, before)
    assert clone.name == "other"


def test_a_frozen_layer_stays_frozen() -> None:
    model = zoo.build("residual")
    model.get_layer("conv2d").trainable = False
    rebuilt = build_model(read_graph(model))
    assert not rebuilt.get_layer("conv2d").trainable
    assert rebuilt.get_layer("conv2d_1").trainable
    assert len(rebuilt.trainable_weights) == len(model.trainable_weights)


def test_normalization_keeps_its_statistics() -> None:
    inputs = keras.Input((8, 8, 3))
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(0).normal(3, 2, size=(4, 8, 8, 3)).astype("float32"))
    model = keras.Model(inputs, layers.Rescaling(2.0, 0.5)(norm(inputs)))
    assert_equal_outputs(model, build_model(read_graph(model)))


def test_elements_of_a_shape() -> None:
    assert n_elements((None, 3, 5, 2)) == 30
    assert n_elements((None, None, 5, 2)) == 10
    assert n_elements((8,)) == 1


def test_an_invalid_graph_cannot_exist() -> None:
    graph = read_graph(zoo.shared("plain"))
    with pytest.raises(ModelError, match="has two calls named"):
        ModelGraph("g", (*graph.nodes, graph.nodes[-1]), graph.inputs, graph.outputs)
    with pytest.raises(ModelError, match="which no call before it writes"):
        ModelGraph("g", graph.nodes[::-1], graph.inputs, graph.outputs)
    with pytest.raises(ModelError, match="names 'nowhere', which no call writes"):
        ModelGraph("g", graph.nodes, graph.inputs, Ref("nowhere"))


def _with(layer):
    inputs = keras.Input((5,))
    return keras.Model(inputs, keras.layers.Dense(2)(layer(inputs)))


def test_a_file_brings_no_code_that_the_model_does_not_hold(tmp_path):
    class Twice(keras.layers.Layer):  # nothing outside this test can import it
        def call(self, x):
            return 2 * x

    for name, layer in (("own", Twice()), ("code", keras.layers.Lambda(lambda x: 2 * x, output_shape=(5,)))):
        model = _with(layer)
        model.save(tmp_path / f"{name}.keras")
        loaded = load_model(tmp_path / f"{name}.keras", like=model)
        x = np.ones((3, 5), "float32")
        np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(model(x)))
    with pytest.raises(ValueError, match="Lambda"):
        load_model(tmp_path / "code.keras", like=_with(Twice()))
