"""Composite layers rewritten into standard ones: equal outputs, the user's model untouched, wrong rules refused."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import updp_tf
from tests import backbones, zoo
from tests.keras.test_graph import assert_same_facts, facts
from updp_tf import affine, expansions, rules
from updp_tf.blocks import find_blocks, prepared_graph
from updp_tf.errors import RuleError
from updp_tf.expansions import expand
from updp_tf.graph import build_model, fingerprint, read_graph

TOLERANCE = 1e-5  # of the outputs, float32


@pytest.fixture(autouse=True)
def registries():
    """Registered rules last for one test."""
    tables = (rules.LINEAR, rules.MACS, rules.ACTIVATIONS, rules._own, rules._own_functions, expansions.EXPANSIONS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def relative_error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(have.astype("float64") - want).max() / np.abs(want).max())


def assert_close(model: keras.Model, other: keras.Model) -> None:
    x = zoo.inputs_of(model)
    for want, have in zip(zoo.outputs_of(model, x), zoo.outputs_of(other, x), strict=True):
        assert np.isfinite(want).all() and want.std() > 1e-3
        assert relative_error(have, want) <= TOLERANCE


def kinds(graph) -> set[str]:
    return {node.kind for node in graph}


# keras_cv and keras_hub


# Every kind of composite layer is in the first; the others run with `-m slow`.
IN_SHORT = ("cv_efficientnet_v2", "cv_mobilenet_v3", "cv_csp_darknet", "cv_mit", "hub_vit", "hub_deit")
LEAST_BLOCKS = {
    "cv_resnet": 3,
    "cv_resnet_v2": 4,
    "cv_efficientnet_lite": 3,
    "cv_efficientnet_v2": 4,
    "cv_mobilenet_v3": 5,
    "cv_csp_darknet": 5,
    "cv_csp_darknet_depthwise": 4,
    "cv_mit": 10,
    "hub_vit": 6,
    "hub_deit": 6,
    "hub_mit": 6,
}


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in IN_SHORT else pytest.mark.slow) for one in backbones.BACKBONES]
)
def test_a_backbone_is_expanded_into_layers_of_keras(name: str) -> None:
    model = backbones.build(name)
    before = facts(model)

    graph = expand(read_graph(model))

    assert_same_facts(before, facts(model))
    assert graph.refused == ()
    # What is left of the libraries does nothing at inference.
    assert all(kind in rules.PASSIVE for kind in kinds(graph) if "." in kind)
    rebuilt = build_model(graph)
    assert_same_facts(before, facts(model))
    assert_close(model, rebuilt)
    # Twice is the same: what is stock stays.
    assert [node.name for node in expand(graph)] == [node.name for node in graph]
    blocks = find_blocks(model)
    assert len(blocks) >= LEAST_BLOCKS[name], blocks


@pytest.mark.parametrize("name", ["cv_efficientnet_v2", pytest.param("cv_csp_darknet", marks=pytest.mark.slow)])
def test_a_backbone_without_expansion_is_rebuilt_bit_for_bit(name: str) -> None:
    model = backbones.build(name)
    rebuilt = build_model(read_graph(model))
    x = zoo.inputs_of(model)
    for want, have in zip(zoo.outputs_of(model, x), zoo.outputs_of(rebuilt, x), strict=True):
        np.testing.assert_array_equal(have, want)


def test_an_expanded_transformer_survives_saving(tmp_path: Path) -> None:
    """The library's own embedding layers cannot be loaded from what they save: stock layers can."""
    model = backbones.build("hub_deit")
    build_model(expand(read_graph(model))).save(tmp_path / "m.keras")
    assert_close(model, keras.models.load_model(tmp_path / "m.keras"))


def test_names_do_not_hang_on_what_was_built_before() -> None:
    """The library numbers layers inside its own with counters of the process."""
    csp = backbones.library("keras_cv").src.models.backbones.csp_darknet.csp_darknet_utils

    def graph():
        inputs = keras.Input((9, 9, 6), name="image")
        return prepared_graph(keras.Model(inputs, csp.CrossStagePartial(8, 1, name="csp")(inputs), name="m"))

    first, second = graph(), graph()
    assert first.by_name["csp_darknet_conv1_0"].layer.name != second.by_name["csp_darknet_conv1_0"].layer.name
    assert [node.name for node in first] == [node.name for node in second]
    assert fingerprint(first) == fingerprint(second)


def test_a_composite_layer_called_twice_stays_shared() -> None:
    keras_cv = backbones.library("keras_cv")
    inputs = keras.Input((9, 9, 6))
    block = keras_cv.layers.FusedMBConvBlock(6, 6, expand_ratio=2, se_ratio=0.5, name="block")
    excite = keras_cv.layers.SqueezeAndExcite2D(6, 2, name="excite")
    model = zoo.randomise(keras.Model(inputs, excite(block(excite(block(inputs))))))
    rebuilt = build_model(expand(read_graph(model)))
    assert rebuilt.count_params() == model.count_params() and len(rebuilt.weights) == len(model.weights)
    assert_close(model, rebuilt)


def test_a_layer_called_in_training_is_left_whole() -> None:
    keras_hub = backbones.library("keras_hub")
    from keras_hub.src.models.vit.vit_layers import ViTEncoderBlock

    assert keras_hub
    inputs = keras.Input((9, 12))
    model = keras.Model(inputs, ViTEncoderBlock(2, 12, 24, name="block")(inputs, training=True))
    (refusal,) = expand(read_graph(model)).refused
    assert str(refusal) == "block: expansion: 'block' is called with training=True"


def test_half_precision_composites_are_expanded() -> None:
    keras_cv = backbones.library("keras_cv")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((9, 9, 6))
        model = keras.Model(inputs, keras_cv.layers.MBConvBlock(6, 6, expand_ratio=2, name="block")(inputs))
    finally:
        keras.config.set_dtype_policy("float32")
    graph = expand(read_graph(zoo.randomise(model)))
    assert graph.refused == () and "block_depthwise" in graph.by_name
    rebuilt = build_model(graph)
    x = zoo.inputs_of(model)
    (want,), (have,) = zoo.outputs_of(model, x), zoo.outputs_of(rebuilt, x)
    assert have.dtype == want.dtype
    np.testing.assert_array_equal(have, want)


# Lambda layers


def test_a_function_of_keras_operations_is_read() -> None:
    inputs = keras.Input((9, 9, 3))
    x = layers.Lambda(lambda x: keras.ops.silu(x * 2.0) - 1.0, name="mine")(layers.Conv2D(4, 3)(inputs))
    model = zoo.randomise(keras.Model(inputs, x))
    graph = expand(read_graph(model))
    assert [node.name for node in graph][-3:] == ["mine_multiply", "mine_silu", "mine_subtract"]
    assert_close(model, build_model(graph))


def test_a_function_of_the_backend_is_left_whole() -> None:
    tf = pytest.importorskip("tensorflow")
    inputs = keras.Input((9, 9, 3))
    model = keras.Model(inputs, layers.Lambda(lambda x: tf.nn.relu(x), name="mine")(inputs))
    graph = expand(read_graph(model))
    (refusal,) = graph.refused
    assert refusal.site == "mine" and "cannot be read as Keras operations: " in refusal.reason
    assert_close(model, build_model(graph))


# Rules of one's own


class Gate(layers.Layer):
    """Squeeze and excite, and a residual: a whole block in one layer."""

    def __init__(self, channels: int, **options) -> None:
        super().__init__(**options)
        self.channels = channels
        self.conv = layers.Conv2D(channels, 3, padding="same")
        self.norm = layers.BatchNormalization()
        self.squeeze = [layers.Dense(3, activation="relu"), layers.Dense(channels, activation="sigmoid")]

    def call(self, x):
        y = self.norm(self.conv(x))
        gate = keras.ops.mean(y, axis=(1, 2), keepdims=True)
        for dense in self.squeeze:
            gate = dense(gate)
        return x + y * gate

    def get_config(self):
        return {**super().get_config(), "channels": self.channels}


def with_gate(layer: layers.Layer | None = None) -> keras.Model:
    inputs = keras.Input((9, 9, 3))
    x = layers.ReLU()(zoo.conv_norm(inputs, 6))
    return zoo.randomise(keras.Model(inputs, (layer or Gate(6, name="gate"))(x)))


def test_an_unknown_layer_is_refused_by_name_and_registry() -> None:
    blocks = find_blocks(with_gate())
    assert len(blocks) == 0
    (refusal,) = blocks.skipped
    assert refusal.site == "gate" and refusal.rule == "unknown_layer"
    assert refusal.reason == (
        f"'gate' is a {Gate.__module__}.Gate, a layer that is not Keras' own; say what it does with "
        "updp_tf.register_linear, register_activation or register_expansion"
    )


@pytest.mark.parametrize("rule", [None, lambda layer, x: layer.call(x)])
def test_a_registered_expansion_finds_the_block(rule) -> None:
    updp_tf.register_expansion(Gate, *[rule] * (rule is not None))
    model = with_gate()
    before = facts(model)
    blocks = find_blocks(model)
    assert_same_facts(before, facts(model))
    assert [block.name for block in blocks] == ["gate_add"] and blocks.skipped == ()
    assert {"gate_conv", "gate_norm", "gate_squeeze_0", "gate_squeeze_1"} <= set(blocks["gate_add"].nodes)
    assert_close(model, build_model(blocks.graph))


def test_an_expansion_written_in_stock_layers() -> None:
    def gate(layer, x):
        y = layer.norm(layer.conv(x))
        weights = layers.GlobalAveragePooling2D(keepdims=True)(y)
        for dense in layer.squeeze:
            weights = dense(weights)
        return layers.Add(name="anything")([x, layers.Multiply()([y, weights])])

    updp_tf.register_expansion(Gate, gate)
    model = with_gate()
    graph = expand(read_graph(model))
    assert "gate_global_average_pooling2d" in graph.by_name and graph.nodes[-1].name == "gate_add"
    assert_close(model, build_model(graph))


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda layer, x: layer.conv(x)[:, 1:], "it returns a tensor of shape .*8, 9, 6.*, the layer one of .*9, 9, 6"),
        (lambda layer, x: layer.conv(x), "its values differ from the layer's by .*, relative to the largest"),
        (lambda layer, x: None, "it returns no Keras tensor as output 0, which is read"),
        (lambda layer, x: (x, x), "it returns 2 tensors, the layer 1"),
        (lambda layer: layer.conv, "it raises TypeError: "),
    ],
)
def test_a_wrong_expansion_is_refused_by_name(rule, reason: str) -> None:
    updp_tf.register_expansion(Gate, rule)
    with pytest.raises(RuleError, match=f"The expansion '.*<lambda>' of '.*Gate' is wrong for 'gate': {reason}"):
        find_blocks(with_gate())


def test_a_rule_may_say_that_it_does_not_cover_a_layer() -> None:
    def gate(layer, x):
        raise updp_tf.Unsupported("has an odd number of channels")

    updp_tf.register_expansion(Gate, gate)
    assert [str(one) for one in find_blocks(with_gate()).skipped] == [
        "gate: expansion: 'gate' has an odd number of channels"
    ]


def test_bad_registrations_are_refused_at_once() -> None:
    updp_tf.register_expansion(Gate)
    for call, reason in [
        (lambda: updp_tf.register_expansion(Gate), "Gate' has an expansion already"),
        (lambda: updp_tf.register_expansion(layers.Conv2D), "'Conv2D' is Keras' own"),
        (lambda: updp_tf.register_expansion("Gate"), "for a class of Keras layers. Received: 'Gate'"),
        (lambda: updp_tf.register_expansion(Scaled, 3), "must be callable. Received: 3"),
        (lambda: updp_tf.register_linear(layers.Dense, lambda layer, shape: ()), "'Dense' is Keras' own"),
        (lambda: updp_tf.register_linear(3, lambda layer, shape: ()), "a class of Keras layers. Received: 3"),
        (lambda: updp_tf.register_linear(Scaled, lambda layer: ()), "callable with 2 positional"),
        (lambda: updp_tf.register_activation(Squared, lambda: "relu"), "callable with 1 positional"),
        (lambda: updp_tf.register_activation("relu", lambda layer: "relu"), "a class of layers or a function"),
        (lambda: updp_tf.register_activation(keras.activations.relu, lambda f: "relu"), "'relu' has a rule already"),
    ]:
        with pytest.raises(RuleError, match=reason):
            call()


def test_a_nested_subclassed_model_is_told_and_can_be_expanded() -> None:
    inner = zoo.subclassed()
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.ReLU()(inner(inputs)))
    (refusal,) = find_blocks(model).skipped
    assert refusal.site == inner.name
    assert "is a subclassed model: what subclassed.<locals>.Plain.call does between its layers (" in refusal.reason
    assert "updp_tf.register_expansion(subclassed.<locals>.Plain) takes `call`" in refusal.reason
    updp_tf.register_expansion(type(inner))
    graph = expand(read_graph(model))
    assert graph.refused == () and f"{inner.name}_conv" in graph.by_name
    assert_close(model, build_model(graph))


class Scaled(layers.Dense):
    """A Dense layer with one more factor."""

    def call(self, x):
        return super().call(x) * 0.5


def scaled(layer, input_shape):
    kernel = keras.ops.convert_to_numpy(layer.kernel) * 0.5
    return (affine.from_dense(kernel, keras.ops.convert_to_numpy(layer.bias) * 0.5),)


def with_scaled() -> keras.Model:
    inputs = keras.Input((9, 9, 3))
    x = layers.ReLU()(zoo.conv_norm(inputs, 6))
    y = layers.ReLU()(Scaled(8, name="scaled")(x))
    return zoo.randomise(keras.Model(inputs, layers.Add(name="add")([zoo.conv_norm(y, 6), x])))


def test_a_registered_linear_layer_is_merged_with() -> None:
    (block,) = find_blocks(with_scaled())
    assert "register_linear" in block.linear_refusal.reason and "'scaled' is a " in block.linear_refusal.reason
    updp_tf.register_linear(Scaled, scaled)
    blocks = find_blocks(with_scaled())
    assert blocks["add"].linear_refusal is None and blocks["add"].geometry.kernel_size == (3, 3)
    assert blocks["add"].cost.macs == 81 * (6 * 8 + 9 * 8 * 6)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda layer, shape: scaled(layer, shape)[0], "it must return a tuple of AffineConv. Received: AffineConv"),
        (lambda layer, shape: (), "it returns a tensor of shape .*, 6., the layer one of .*, 8."),
        (lambda layer, shape: (affine.identity(5),), "Images must have shape"),
        (
            lambda layer, shape: (affine.from_dense(rules.as_array(layer.kernel), rules.as_array(layer.bias)),),
            "its values differ from the layer's by 1",
        ),
    ],
)
def test_a_wrong_linear_rule_is_refused_by_name(rule, reason: str) -> None:
    updp_tf.register_linear(Scaled, rule)
    with pytest.raises(RuleError, match=f"The rule '.*<lambda>' of '.*Scaled' is wrong for 'scaled': {reason}"):
        find_blocks(with_scaled())


class Squared(layers.Layer):
    """A squared ReLU as a layer."""

    def call(self, x):
        return keras.ops.square(keras.ops.relu(x))


def squared_relu(x):
    return keras.ops.square(keras.ops.relu(x))


def with_activation(activation) -> keras.Model:
    inputs = keras.Input((9, 9, 3))
    x = layers.ReLU()(zoo.conv_norm(inputs, 6))
    y = zoo.conv_norm(x, 6)
    y = activation(y) if isinstance(activation, layers.Layer) else layers.Activation(activation, name="mine")(y)
    return zoo.randomise(keras.Model(inputs, layers.Add(name="add")([layers.Conv2D(6, 1)(y), x])))


@pytest.mark.parametrize("target", [Squared, squared_relu])
def test_a_registered_activation_is_linearised(target) -> None:
    def model() -> keras.Model:
        return with_activation(Squared(name="mine") if isinstance(target, type) else target)

    assert find_blocks(model())["add"].linear_refusal is not None
    updp_tf.register_activation(target, lambda _: lambda z: np.maximum(z, 0.0) ** 2)
    blocks = find_blocks(model())
    assert blocks["add"].linear_refusal is None
    small = updp_tf.prune(model(), budget={"merged": 1})
    assert [block.name for block in small.pruning.blocks] == ["add"]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (lambda _: "relu", "its values differ from the layer's by"),
        (lambda _: 3, "must return a name, an Activation or a function of arrays. Received: 3"),
        (lambda _: lambda z: z[..., :1], "it returns a tensor of shape"),
    ],
)
def test_a_wrong_activation_rule_is_refused_by_name(rule, reason: str) -> None:
    updp_tf.register_activation(Squared, rule)
    with pytest.raises(RuleError, match=f"The rule '.*<lambda>' of '.*Squared' .*{reason}"):
        find_blocks(with_activation(Squared(name="mine")))


def test_a_class_that_is_only_called_as_one_of_keras_is_not_taken_for_it() -> None:
    class Conv2D(layers.Conv2D):
        def call(self, x):
            return keras.ops.tanh(super().call(x))

    inputs = keras.Input((9, 9, 3))
    x = layers.ReLU()(Conv2D(6, 3, padding="same", name="mine")(inputs))
    model = zoo.randomise(keras.Model(inputs, layers.Conv2D(6, 3)(x)))
    blocks = find_blocks(model)
    assert len(blocks) == 0
    assert any(refusal.site == "mine" and refusal.rule == "unknown_layer" for refusal in blocks.skipped)


def test_a_fingerprint_knows_slices() -> None:
    def model(start: int) -> keras.Model:
        keras.utils.clear_session(free_memory=False)
        inputs = keras.Input((8, 8, 3))
        return keras.Model(inputs, inputs[:, start::2, ..., :2], name="m")

    assert fingerprint(read_graph(model(0))) != fingerprint(read_graph(model(1)))
