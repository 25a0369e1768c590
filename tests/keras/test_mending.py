"""Folding norms, renewing their statistics, refitting closing layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from tests import zoo
from tests.keras.test_graph import assert_same_facts, facts
from tests.keras.test_merging import images_for, inputs_of_norms, relative_error, weights_of
from updp_tf import fold_norms, reestimate_norms, refit
from updp_tf.errors import CalibrationError, ModelError
from updp_tf.graph import build_model, read_graph
from updp_tf.mending import fold_norms_in

NORMS = {
    # name: (norms called in the model, of them folded)
    "plain": (2, 2),
    "sequential": (1, 0),  # behind a fused activation
    "nested": (3, 3),
    "doubly_nested": (4, 4),
    "nested_twice": (5, 1),  # the inner ones are called twice
    "nested_many_outputs": (2, 2),
    "shared_layer": (5, 3),
    "residual": (11, 11),
    "bottlenecks": (12, 12),
    "inverted_residuals": (13, 13),
    "mobilenet_v1": (7, 7),
    "vgg": (0, 0),
    "separable": (3, 1),  # SeparableConv2D keeps its norm
    "concatenation": (3, 3),
    "two_inputs_outputs": (2, 2),
    "operations": (3, 3),
    "dropout_and_noise": (3, 3),
    "squeeze_excite": (6, 6),
    "layer_norm": (2, 1),  # one behind an Add
    "dilated": (3, 3),
    "grouped": (5, 5),
    "preactivation": (6, 4),  # two in front of their layers
    "parallel": (5, 5),
    "training_flags": (5, 4),  # not the one that uses batch statistics
    "dynamic": (9, 9),
    "half": (6, 6),
    "broadcast_add": (2, 2),
}


def norms_in(model: keras.Model) -> int:
    return sum(node.kind == "BatchNormalization" for node in read_graph(model))


@pytest.mark.parametrize("name", NORMS)
def test_folding_keeps_outputs(name: str) -> None:
    model = zoo.shared(name)
    before = facts(model)
    n, n_folded = NORMS[name]
    assert norms_in(model) == n

    folded = fold_norms(model)

    assert norms_in(folded) == n - n_folded
    assert len(fold_norms_in(read_graph(model))[1]) == n_folded
    assert_same_facts(before, facts(model))
    inputs = zoo.inputs_of(model)
    for have, want in zip(zoo.outputs_of(folded, inputs), zoo.outputs_of(model, inputs), strict=True):
        assert relative_error(have, want) <= (2e-2 if name == "half" else 1e-4)  # METHOD section 3


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: layers.Conv2D(6, 3, strides=2, padding="same", **o),
        lambda **o: layers.Conv2D(6, 3, groups=2, **o),
        lambda **o: layers.DepthwiseConv2D(3, depth_multiplier=2, **o),
        lambda **o: layers.Conv2DTranspose(5, 3, strides=2, **o),
        lambda **o: layers.Dense(5, **o),
    ],
)
def test_every_kind_that_can_take_a_norm(make, use_bias: bool) -> None:
    inputs = keras.Input((9, 9, 4))
    for options in ({}, {"scale": False}, {"center": False}):
        x = layers.BatchNormalization(**options)(make(use_bias=use_bias)(inputs))
        model = zoo.randomise(keras.Model(inputs, layers.ReLU()(x)))
        folded = fold_norms(model)
        assert norms_in(folded) == 0
        x = zoo.inputs_of(model)
        assert relative_error(zoo.outputs_of(folded, x)[0], zoo.outputs_of(model, x)[0]) <= 1e-5


def test_what_cannot_be_folded_stays() -> None:
    inputs = keras.Input((9, 9, 4))
    conv = layers.Conv2D(4, 3, padding="same", name="read_twice")(inputs)
    x = layers.Add()([conv, layers.BatchNormalization()(conv)])
    x = layers.BatchNormalization(axis=1)(layers.Conv2D(4, 3, padding="same", name="rows")(x))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu", name="active")(x))
    shown = layers.Conv2D(4, 3, name="shown")(x)
    model = zoo.randomise(keras.Model(inputs, [shown, layers.BatchNormalization()(shown)]))
    folded = fold_norms(model)
    assert norms_in(folded) == norms_in(model) == 4
    x = zoo.inputs_of(model)
    for have, want in zip(zoo.outputs_of(folded, x), zoo.outputs_of(model, x), strict=True):
        np.testing.assert_array_equal(have, want)


def test_two_norms_in_a_row_are_both_folded() -> None:
    inputs = keras.Input((9, 9, 4))
    x = layers.BatchNormalization()(zoo.conv_norm(inputs, 5))
    model = zoo.randomise(keras.Model(inputs, x))
    folded = fold_norms(model)
    assert norms_in(folded) == 0
    x = zoo.inputs_of(model)
    assert relative_error(zoo.outputs_of(folded, x)[0], zoo.outputs_of(model, x)[0]) <= 1e-5


def test_a_norm_behind_an_output_stays() -> None:
    inputs = keras.Input((9, 9, 4))
    shown = zoo.conv_norm(inputs, 5)
    model = zoo.randomise(keras.Model(inputs, [shown, layers.BatchNormalization()(shown)]))
    folded = fold_norms(model)
    assert norms_in(folded) == 1
    x = zoo.inputs_of(model)
    for have, want in zip(zoo.outputs_of(folded, x), zoo.outputs_of(model, x), strict=True):
        assert relative_error(have, want) <= 1e-5


# Statistics


@pytest.mark.parametrize("name", ["residual", "inverted_residuals", "preactivation", "squeeze_excite", "two_branches"])
@pytest.mark.parametrize("memory_bytes", [0, 10**9])
def test_statistics_are_those_of_the_images(name: str, memory_bytes: int) -> None:
    model = zoo.shared(name)
    before = facts(model)
    images = images_for(model, 10)
    small = reestimate_norms(model, images, memory_bytes=memory_bytes)
    assert_same_facts(before, facts(model))
    found = inputs_of_norms(small, images)
    assert len(found) == norms_in(model)
    for norm_name, x in found.items():
        norm = small.get_layer(norm_name)
        variance = x.var(axis=(0, 1, 2))
        np.testing.assert_allclose(norm.moving_variance, variance, rtol=1e-4)
        np.testing.assert_allclose(norm.moving_mean, x.mean(axis=(0, 1, 2)), atol=1e-4 * np.sqrt(variance).max())
    # Everything else is as it was.
    for layer in small.layers:
        if not isinstance(layer, layers.BatchNormalization):
            for have, want in zip(layer.weights, model.get_layer(layer.name).weights, strict=True):
                np.testing.assert_array_equal(have, want)


def test_statistics_are_exact_far_from_zero() -> None:
    inputs = keras.Input((9, 9, 3))
    model = zoo.randomise(keras.Model(inputs, layers.BatchNormalization(name="norm")(inputs)))
    # More than a batch, and each batch brighter than the one before.
    images = 1000.0 + np.random.default_rng(0).normal(size=(300, 9, 9, 3)) + np.linspace(0, 5, 300)[:, None, None, None]
    norm = reestimate_norms(model, images.astype("float32")).get_layer("norm")
    np.testing.assert_allclose(norm.moving_variance, images.var(axis=(0, 1, 2)), rtol=1e-3)
    np.testing.assert_allclose(norm.moving_mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)


def test_a_norm_that_is_called_twice_is_left_alone() -> None:
    model = zoo.shared("shared_layer")
    small = reestimate_norms(model, images_for(model, 10))
    assert small.count_params() == model.count_params()
    for layer in small.layers:
        if isinstance(layer, layers.BatchNormalization):
            equal = np.array_equal(layer.moving_mean, model.get_layer(layer.name).moving_mean)
            assert equal == (layer.name == "batch_normalization_1")


def test_images_come_in_any_form_and_the_result_is_the_same() -> None:
    model = zoo.shared("residual")
    images = images_for(model, 12)
    want = weights_of(reestimate_norms(model, images))
    for source in ([images[:5], images[5:]], iter([(images, None)]), images.astype("float64")):
        for a, b in zip(weights_of(reestimate_norms(model, source)), want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_model_in_half_precision_and_one_of_any_size() -> None:
    for name in ("half", "dynamic"):
        model = zoo.shared(name)
        images = images_for(model, 10)
        small = reestimate_norms(model, images)
        for norm_name, x in inputs_of_norms(small, images).items():
            norm = small.get_layer(norm_name)
            np.testing.assert_allclose(norm.moving_variance, x.var(axis=(0, 1, 2)), rtol=1e-2)


def test_bad_images_are_refused() -> None:
    model = zoo.shared("residual")
    with pytest.raises(CalibrationError, match=r"has shape \(2, 9, 9, 3\); the model reads images of shape"):
        reestimate_norms(model, np.zeros((2, 9, 9, 3)))
    with pytest.raises(CalibrationError, match="has 2 inputs; calibration works for models with one"):
        reestimate_norms(zoo.shared("two_inputs_outputs"), np.zeros((2, 17, 17, 3)))


# Refits


def _damaged(model: keras.Model) -> keras.Model:
    """A student whose first block has lost part of its first kernel."""
    student = build_model(read_graph(model))
    kernel = student.get_layer("conv2d_1").kernel
    mask = np.random.default_rng(0).uniform(size=kernel.shape) < 0.5
    kernel.assign(np.asarray(kernel) * mask)
    return student


def _error(model: keras.Model, teacher: keras.Model, images: np.ndarray, layer: str) -> float:
    have, want = (
        zoo.outputs_of(keras.Model(one.input, one.get_layer(layer).output), images)[0] for one in (model, teacher)
    )
    return float(np.square(have - want).sum() / np.square(want - want.mean(axis=(0, 1, 2))).sum())


def test_a_refit_improves_a_damaged_student_on_new_images() -> None:
    teacher = zoo.build("residual")
    student = _damaged(teacher)
    before_student, before_teacher = facts(student), facts(teacher)
    images, unseen = images_for(teacher, 60), images_for(teacher, 20, seed=12)

    mended = refit(student, teacher, images)

    assert_same_facts(before_student, facts(student))
    assert_same_facts(before_teacher, facts(teacher))
    for layer in ("add", "re_lu_8"):
        assert _error(mended, teacher, unseen, layer) < 0.8 * _error(student, teacher, unseen, layer)
    assert mended.count_params() == student.count_params()
    again = refit(student, teacher, images, memory_bytes=0)
    for a, b in zip(weights_of(mended), weights_of(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_refit_of_an_undamaged_student_changes_nothing() -> None:
    teacher = zoo.shared("residual")
    student = build_model(read_graph(teacher))
    mended = refit(student, teacher, images_for(teacher, 40))
    for a, b in zip(weights_of(mended), weights_of(student), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_refit_of_another_model_is_refused() -> None:
    with pytest.raises(
        ModelError, match="'vgg' and 'residual' have no block of the same name and shape; nothing to refit"
    ):
        refit(zoo.shared("vgg"), zoo.shared("residual"), images_for(zoo.shared("residual"), 4))


def test_blocks_of_other_sizes_are_not_taken_for_the_same() -> None:
    """Two networks whose automatic names happen to agree."""
    teacher, student = zoo.shared("bottlenecks"), zoo.shared("grouped")
    with pytest.raises(ModelError, match="no block of the same name and shape"):
        refit(student, teacher, images_for(teacher, 20))
