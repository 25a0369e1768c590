"""Merged blocks that are merged again: one layer, equal outputs, fewer multiplications, or left as they are."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import updp_tf
from tests import zoo
from updp_tf.blocks import find_blocks, network_cost, prepared_graph
from updp_tf.graph import read_graph
from updp_tf.merging import Choice, merge_in_sequence
from updp_tf.rejoining import rejoined


def chain(*forms, channels=6, tap=None):
    """Blocks without an activation between them, merged into these forms with their skips kept."""
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 7, 3))
    x = layers.Conv2D(channels, 3, padding="same", activation="relu")(inputs)
    for _ in forms:
        x = zoo.inverted(x, channels, expansion=4)
        tap = x if tap == "first" else tap
    outputs = [layers.ReLU()(x)] + ([] if tap is None else [tap])
    model = zoo.randomise(keras.Model(inputs, outputs))
    blocks = find_blocks(model)
    assert len(blocks) == len(forms)
    choices = [Choice(block.name, form, "kept") for block, form in zip(blocks, forms, strict=True)]
    images = zoo.inputs_of(model, n=60)
    return merge_in_sequence(blocks, choices, images), images


def macs(model):
    return network_cost(prepared_graph(model)).macs


@pytest.mark.parametrize(
    ("forms", "layer", "saved"),
    [
        (("pointwise", "pointwise"), (1, 1), 36),
        (("pointwise", "pointwise", "pointwise"), (1, 1), 72),
        (("conv3", "pointwise"), (3, 3), 36),
    ],
    ids=str,
)
def test_neighbours_become_one_layer_where_that_multiplies_less(forms, layer, saved):
    merged, images = chain(*forms)
    again, names = rejoined(merged)
    assert len(names) == 1 and names[0].endswith("_merged")
    made = again.model.get_layer(names[0])
    assert made.kernel_size == layer and not any(isinstance(one, layers.Add) for one in again.model.layers)
    assert macs(merged.model) - macs(again.model) == saved * 9 * 7
    want, have = (np.asarray(one.model(images, training=False), "float64") for one in (merged, again))
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()  # borders included


@pytest.mark.parametrize(
    "forms",
    [("conv3", "conv3"), ("pointwise", "conv3"), ("separable3", "separable3")],
    ids=["larger", "border", "dense"],
)
def test_neighbours_stay_where_one_layer_would_cost_more_or_see_another_border(forms):
    """A biased map in front of a padded one is read as zeros outside; a composed one would show its bias there."""
    merged, _ = chain(*forms)
    assert rejoined(merged) == (merged, ())


def test_what_others_read_stays():
    merged, _ = chain("pointwise", "pointwise", tap="first")
    assert rejoined(merged) == (merged, ())


def test_layers_of_the_users_own_stay():
    """The kept block's projection and norm are linear too, but nobody asked for them to be merged."""
    merged, images = chain("pointwise", "pointwise")
    model = merged.model
    left = {node.name for node in read_graph(model) if "_merged" not in node.name and node.kind != "Add"}
    assert left <= {node.name for node in read_graph(rejoined(merged)[0].model)}


def branches(forms, *, strides=1, entry="same", tap=False):
    """Two chains whose sum is read, as NASNet's cells have them, merged into these forms."""
    keras.utils.clear_session(free_memory=False)
    inputs = keras.Input((9, 7, 6))
    x = layers.ReLU()(zoo.conv_norm(inputs, 6))
    other = layers.MaxPooling2D(3, strides=1, padding="same")(x) if entry == "other" else x
    sides = []
    for side, kernel in ((x, 5), (other, 3)):
        for step in (strides, 1):
            side = layers.SeparableConv2D(6, kernel, strides=step, padding="same", use_bias=False)(layers.ReLU()(side))
            side = layers.BatchNormalization()(side)
        sides.append(side)
    outputs = [layers.ReLU()(layers.Add()(sides)), *([sides[0]] if tap else [])]
    model = zoo.randomise(keras.Model(inputs, outputs))
    blocks = [block for block in find_blocks(model) if "separable" in block.body[1]]
    assert len(blocks) == 2
    choices = [Choice(block.name, form, "folded") for block, form in zip(blocks, forms, strict=True)]
    images = zoo.inputs_of(model, n=60)
    return merge_in_sequence(find_blocks(model), choices, images), images


@pytest.mark.parametrize(
    ("forms", "strides", "saved"),
    [(("pointwise", "pointwise"), 1, 36), (("conv3", "pointwise"), 1, 36), (("conv3", "conv3"), 2, 324)],
    ids=str,
)
def test_two_that_are_added_become_their_sum(forms, strides, saved):
    """NASNet's cells add two branches that read the same tensor: merged, they are one layer."""
    merged, images = branches(forms, strides=strides)
    again, names = rejoined(merged)
    assert len(names) == 1 and "_and_" in names[0]
    assert not any(isinstance(one, layers.Add) for one in again.model.layers)
    assert macs(merged.model) - macs(again.model) == saved * -(-9 // strides) * -(-7 // strides)
    want, have = (np.asarray(one.model(images, training=False), "float64") for one in (merged, again))
    assert np.abs(have - want).max() <= 1e-5 * np.abs(want).max()  # borders included


@pytest.mark.parametrize(
    ("forms", "how"),
    [
        (("pointwise", "pointwise"), {"entry": "other"}),
        (("pointwise", "pointwise"), {"tap": True}),
        (("separable3", "separable3"), {}),
    ],
    ids=["other entry", "read elsewhere", "dense would cost more"],
)
def test_sums_stay_where_there_is_no_cheaper_layer(forms, how):
    merged, _ = branches(forms, **how)
    assert rejoined(merged) == (merged, ())


def test_prune_and_merge_do_it_where_asked():
    inputs = keras.Input((8, 5))
    x = inputs
    for _ in range(3):
        x = layers.Add()([x, layers.Dense(5)(layers.Activation("gelu")(layers.Dense(20)(x)))])
    model = zoo.randomise(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)))
    x = zoo.inputs_of(model, n=60)
    options = updp_tf.Options(rejoin=True)
    ask = {"budget": {"merged": 3}, "forms": ("pointwise",), "verbose": False}
    plain = updp_tf.prune(model, calibration=x, **ask)
    small = updp_tf.prune(model, calibration=x, options=options, **ask)
    assert [type(layer).__name__ for layer in small.layers] == ["InputLayer", "Dense", "Dense"]
    assert small.pruning.after.macs == macs(small) == 8 * (25 + 20)
    assert any("merged again" in note for note in small.pruning.notes)
    np.testing.assert_allclose(np.asarray(small(x)), np.asarray(plain(x)), atol=1e-5)
    again = updp_tf.merge(model, small.pruning.plan, calibration=x, options=options, verbose=False)
    np.testing.assert_allclose(np.asarray(again(x)), np.asarray(small(x)), atol=1e-6)
