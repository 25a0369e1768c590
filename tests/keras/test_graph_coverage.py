"""What models out there are made of: nested, shared, tapped, half precision, channels first, preprocessing in front.

Weights are random in all respects (tests/zoo.py); reading and rebuilding is compared bit for bit.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from tests.keras.test_graph import assert_equal_outputs, assert_same_facts, facts
from updp_tf import rules
from updp_tf.blocks import find_blocks, prepared_graph
from updp_tf.folding import fold_preprocessing_in
from updp_tf.graph import build_model, read_graph, run_nodes
from updp_tf.structure import Ref


def assert_rebuilt(model: keras.Model) -> keras.Model:
    """Read, rebuild, compare bit for bit; the original is left alone."""
    before = facts(model)
    rebuilt = build_model(read_graph(model))
    assert_same_facts(before, facts(model))
    assert_equal_outputs(model, rebuilt)
    assert rebuilt.count_params() == model.count_params()
    assert_equal_outputs(model, build_model(prepared_graph(model)))
    return rebuilt


def mobilenet(size: int = 32) -> keras.Model:
    """The first ten blocks."""
    keras.utils.clear_session(free_memory=False)
    whole = keras.applications.MobileNetV2((size, size, 3), alpha=0.35, weights=None, include_top=False)
    return keras.Model(whole.input, whole.get_layer("block_9_add").output, name="mobilenet")


# Nested and shared


def test_a_backbone_in_a_sequential_in_a_model() -> None:
    body = keras.Sequential([keras.Input((32, 32, 3)), layers.Rescaling(1 / 127.5, -1.0), mobilenet()], name="body")
    inputs = keras.Input((32, 32, 3))
    x = layers.GlobalAveragePooling2D()(body(layers.RandomFlip()(inputs)))
    model = zoo.randomise(keras.Model(inputs, layers.Dense(5, activation="softmax")(layers.Dropout(0.2)(x))))
    rebuilt = assert_rebuilt(model)
    assert not any(isinstance(layer, keras.Model) for layer in rebuilt.layers)
    # Every block of the backbone is found inside two models.
    assert len(find_blocks(model)) == 10


def test_a_model_called_twice_shares_its_layers_in_every_call() -> None:
    """A siamese network: two images, one tower."""
    tower_inputs = keras.Input((15, 17, 3))
    tower = keras.Model(tower_inputs, zoo.basic(layers.ReLU()(zoo.conv_norm(tower_inputs, 6)), 6), name="tower")
    left, right = keras.Input((15, 17, 3), name="left"), keras.Input((15, 17, 3), name="right")
    distance = layers.Subtract()([tower(left), tower(right)])
    model = zoo.randomise(keras.Model({"left": left, "right": right}, [zoo.head(distance), tower(right)]))
    assert_rebuilt(model)
    graph = read_graph(model)
    calls = [node for node in graph if node.kind == "Conv2D"]
    assert len(calls) == 3 * len({id(node.layer) for node in calls})
    assert not {node.name for node in calls} & graph.called_once


def test_a_submodel_of_a_functional_model_with_inputs_in_a_list_and_a_dict() -> None:
    first, second = keras.Input((9, 9, 4), name="first"), keras.Input((9, 9, 4), name="second")
    y = layers.Concatenate()([layers.Conv2D(4, 3, padding="same")(first), second])
    inner = keras.Model([first, second], {"sum": layers.Conv2D(4, 1)(y), "pair": [y, first]}, name="inner")
    image = keras.Input((9, 9, 4), name="image")
    found = inner([image, layers.ReLU()(image)])
    x = layers.Add()([found["sum"], found["pair"][1]])
    model = zoo.randomise(keras.Model({"image": image}, {"b": x, "a": found["pair"][0]}))
    assert_rebuilt(model)


def test_operations_with_several_outputs_slices_and_constants() -> None:
    inputs = keras.Input((12, 12, 6))
    left, right = keras.ops.split(inputs[:, ::2, 1:-1, :] * np.float32(0.5), 2, axis=-1)
    x = keras.ops.concatenate([keras.ops.flip(left, axis=2), keras.ops.pad(right, ((0, 0),) * 3 + ((0, 1),))], axis=-1)
    x = keras.ops.where(x > 0.0, layers.Conv2D(7, 3, padding="same")(x), keras.ops.max(x, axis=(1, 2), keepdims=True))
    x = keras.ops.einsum("bhwc,cd->bhwd", x, np.eye(7, 5, dtype="float32"))
    model = zoo.randomise(keras.Model(inputs, [keras.ops.mean(x, axis=(1, 2)), keras.ops.transpose(x, (0, 3, 1, 2))]))
    assert_rebuilt(model)


# Feature pyramids


def test_a_tap_in_the_middle_of_a_backbone_is_never_swallowed() -> None:
    """Detectors read the expanded tensor inside a block of stride 2, and whatever a user asks for."""
    backbone = mobilenet(64)
    taps = ["block_3_expand_relu", "block_6_expand_relu", "block_8_depthwise_relu", "block_9_add"]
    outputs = {f"P{i}": backbone.get_layer(name).output for i, name in enumerate(taps)}
    model = zoo.randomise(keras.Model(backbone.input, outputs))
    assert_rebuilt(model)
    graph = prepared_graph(model)
    tapped = {ref.node for ref in graph.output_refs}
    assert tapped == set(taps)
    blocks = find_blocks(model)
    for block in blocks:
        assert not tapped & (set(block.nodes) - {block.exit.node})
    # The untapped blocks are still there, and the residual one that is tapped is told.
    assert {"block_2_add", "block_4_add", "block_7_add", "block_9_add"} <= {block.name for block in blocks}
    (refusal,) = [one for one in blocks.skipped if one.site == "block_8_add"]
    assert refusal.reason == "'block_8_depthwise_relu' inside it is read outside, as an output of the model"


def test_a_tap_read_by_another_part_is_never_swallowed() -> None:
    backbone = mobilenet(64)
    x = backbone.get_layer("block_8_expand_relu").output
    merged = layers.Add(name="pyramid")([layers.Conv2D(8, 1)(backbone.output), layers.Conv2D(8, 1)(x)])
    model = zoo.randomise(keras.Model(backbone.input, [backbone.output, merged]))
    assert_rebuilt(model)
    blocks = find_blocks(model)
    assert not any("block_8_expand_relu" in block.nodes for block in blocks)
    assert any(one.site == "block_8_add" and "is read outside, by '" in one.reason for one in blocks.skipped)


# Half precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        inputs, x = zoo.stem(6)
        x = zoo.basic(x, 6)
        x = zoo.inverted(x, 6, expansion=2)
        y = layers.LayerNormalization()(layers.Dense(6, activation="gelu")(x))
        x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
        model = keras.Model(inputs, layers.Dense(5, activation="softmax", dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    rebuilt = assert_rebuilt(zoo.randomise(model))
    assert {layer.dtype_policy.name for layer in rebuilt.layers} == {policy, "float32"}
    assert {layer.compute_dtype for layer in rebuilt.layers if isinstance(layer, layers.Conv2D)} == {policy[6:]}
    (half, single) = (find_blocks(one) for one in (model, _in_float32(model)))
    assert [block.name for block in half] == [block.name for block in single] and len(half) == 3


def _in_float32(model: keras.Model) -> keras.Model:
    def clone(layer):
        config = layer.get_config()
        config["dtype"] = "float32"
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=clone)


# Channels first


def channels_first() -> keras.Model:
    inputs = keras.Input((3, 12, 10))

    def conv(x, filters: int, kernel_size: int = 3):
        x = layers.Conv2D(filters, kernel_size, padding="same", data_format="channels_first")(x)
        return layers.BatchNormalization(axis=1)(x)

    x = layers.ReLU()(conv(inputs, 6))
    x = layers.Add(name="residual")([conv(layers.ReLU()(conv(x, 6)), 6), x])
    x = layers.MaxPooling2D(2, data_format="channels_first")(x)
    x = layers.ReLU()(conv(layers.ReLU()(conv(x, 8, 1)), 8))
    x = layers.GlobalAveragePooling2D(data_format="channels_first")(x)
    return zoo.randomise(keras.Model(inputs, layers.Dense(5)(x)))


def test_channels_first_is_read_and_its_blocks_are_refused() -> None:
    """TensorFlow runs them on a CPU when it is allowed to compile."""
    tf = pytest.importorskip("tensorflow")
    model = channels_first()
    x = zoo.inputs_of(model)
    outputs = [
        tf.function(lambda x, one=one: one(x, training=False), jit_compile=True)(x)
        for one in (model, build_model(read_graph(model)), build_model(prepared_graph(model)))
    ]
    assert np.isfinite(outputs[0]).all() and np.std(outputs[0]) > 0
    for have in outputs[1:]:
        np.testing.assert_array_equal(have, outputs[0])
    blocks = find_blocks(model)
    assert len([block for block in blocks if block.geometry is not None]) == 0
    assert all("channels_first" in one.reason for one in blocks.skipped) and blocks.skipped


# What only acts in training


TRAINING_ONLY = {
    "AugMix": layers.AugMix,
    "CutMix": layers.CutMix,
    "MixUp": layers.MixUp,
    "RandAugment": layers.RandAugment,
    "RandomBrightness": lambda: layers.RandomBrightness(0.3),
    "RandomColorDegeneration": lambda: layers.RandomColorDegeneration(0.3),
    "RandomColorJitter": lambda: layers.RandomColorJitter(brightness_factor=0.3),
    "RandomContrast": lambda: layers.RandomContrast(0.3),
    "RandomElasticTransform": layers.RandomElasticTransform,
    "RandomErasing": layers.RandomErasing,
    "RandomFlip": layers.RandomFlip,
    "RandomGaussianBlur": layers.RandomGaussianBlur,
    "RandomGrayscale": layers.RandomGrayscale,
    "RandomHue": lambda: layers.RandomHue(0.3),
    "RandomInvert": layers.RandomInvert,
    "RandomPerspective": layers.RandomPerspective,
    "RandomPosterization": lambda: layers.RandomPosterization(4),
    "RandomRotation": lambda: layers.RandomRotation(0.2),
    "RandomSaturation": lambda: layers.RandomSaturation(0.3),
    "RandomSharpness": lambda: layers.RandomSharpness(0.3),
    "RandomShear": lambda: layers.RandomShear(0.3, 0.3),
    "RandomTranslation": lambda: layers.RandomTranslation(0.2, 0.2),
    "RandomZoom": lambda: layers.RandomZoom(0.3),
    "Solarization": layers.Solarization,
}


def test_augmentations_do_nothing_at_inference() -> None:
    """Called on their own they take it for granted that they are in training; run as nodes they must not."""
    x = np.random.default_rng(0).uniform(0, 255, (2, 12, 12, 3)).astype("float32")
    inputs = keras.Input((12, 12, 3))
    for kind, make in TRAINING_ONLY.items():
        graph = read_graph(keras.Model(inputs, make()(inputs)))
        node = graph.nodes[-1]
        assert node.kind == kind and rules.is_passive(node), kind
        values = {graph.input_refs[0]: keras.ops.convert_to_tensor(x)}
        run_nodes(graph, values)
        np.testing.assert_array_equal(values[Ref(node.name)], x, err_msg=kind)


def test_every_passive_kind_of_keras_is_tested() -> None:
    others = {"StochasticDepth", "SpatialDropout1D"}
    elsewhere = {"ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise", "Identity"}
    here = {*TRAINING_ONLY, *others, *elsewhere, "SpatialDropout2D"}
    assert {kind for kind in rules.PASSIVE if "." not in kind} == here


def test_stochastic_depth_and_layer_scale() -> None:
    from keras.src.applications.convnext import LayerScale, StochasticDepth

    inputs, x = zoo.stem(6)
    y = layers.Conv2D(6, 7, padding="same", groups=6)(x)
    y = LayerScale(1.0, 6)(layers.Dense(6)(layers.Activation("gelu")(layers.Dense(12)(y))))
    x = layers.Add(name="convnext")([x, StochasticDepth(0.3)(y)])
    model = zoo.randomise(keras.Model(inputs, zoo.head(x)))
    assert_rebuilt(model)
    assert find_blocks(model)["convnext"].linear_refusal is None


# Preprocessing in front


def preprocessed(*, padding: str, offset: float) -> keras.Model:
    """Rescaling and Normalization, as the EfficientNets have them, in front of a stem."""
    inputs = keras.Input((17, 15, 3))
    norm = layers.Normalization(mean=[3.0, -1.0, 0.5] if offset else [0.0, 0.0, 0.0], variance=[2.0, 0.5, 1.5])
    x = layers.Rescaling(1 / 127.5, offset=offset)(inputs)
    x = layers.Rescaling([1 / 0.3, 1 / 0.5, 2.0])(layers.Dropout(0.1)(norm(x)))
    x = layers.Conv2D(6, 3, strides=2, padding=padding)(x)
    return zoo.randomise(keras.Model(inputs, zoo.head(layers.ReLU()(x))))


@pytest.mark.parametrize(("padding", "offset", "left"), [("valid", -1.0, 0), ("same", 0.0, 0), ("same", -1.0, 2)])
def test_preprocessing_is_folded_where_that_is_exact(padding: str, offset: float, left: int) -> None:
    model = preprocessed(padding=padding, offset=offset)
    before = facts(model)
    graph, folded = fold_preprocessing_in(read_graph(model))
    assert_same_facts(before, facts(model))
    assert len(folded) == 3 - left
    assert sum(node.kind in ("Rescaling", "Normalization") for node in graph) == left
    x = zoo.inputs_of(model)
    (want,), (have,) = zoo.outputs_of(model, x), zoo.outputs_of(build_model(graph), x)
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()


def test_preprocessing_that_others_read_stays() -> None:
    inputs = keras.Input((9, 9, 3))
    x = layers.Rescaling(0.5)(inputs)
    y = layers.Conv2D(4, 3)(x)
    model = zoo.randomise(keras.Model(inputs, [y, layers.Conv2D(4, 1)(x)]))
    assert fold_preprocessing_in(read_graph(model))[1] == ()
