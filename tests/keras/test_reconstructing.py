"""Training the fitted layers alone: kept where held-out images gain, dropped where they do not."""

import keras
import numpy as np
import pytest

from updp_tf import reconstructing
from updp_tf.blocks import find_blocks
from updp_tf.forms import form_by_name
from updp_tf.merging import Choice, merge_in_sequence
from updp_tf.reconstructing import reconstruct


@pytest.fixture(scope="module")
def case():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((12, 12, 3))
    x = layers.ReLU()(layers.Conv2D(6, 3, padding="same")(inputs))
    for name in ("first", "second"):
        y = layers.ReLU()(layers.Conv2D(6, 3, padding="same", bias_initializer="random_normal")(x))
        x = layers.Add(name=name)([x, layers.Conv2D(6, 3, padding="same", bias_initializer="random_normal")(y)])
    outputs = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    images = np.random.default_rng(0).normal(size=(60, 12, 12, 3)).astype("float32")
    blocks = find_blocks(model)
    choices = [Choice(block.name, "pointwise", "kept") for block in blocks]
    assert form_by_name("pointwise").refuses(blocks[0], skip="kept") is None
    return model, merge_in_sequence(blocks, choices, images), images, [block.name for block in blocks]


@pytest.fixture(scope="module")
def trained_case(case):
    model, merged, images, names = case
    return reconstruct(merged.model, model, names, images, steps=40, learning_rate=3e-3)


def test_it_lowers_the_error_on_held_out_images_and_says_so(case, trained_case):
    model, merged, _, _ = case
    trained, told = trained_case
    assert told.kept and told.after < told.before and told.steps == 40
    unseen = np.random.default_rng(1).normal(size=(40, 12, 12, 3)).astype("float32")
    errors = [float(np.square(one(unseen) - model(unseen)).mean()) for one in (merged.model, trained)]
    assert errors[1] < errors[0]


def test_only_the_fitted_layers_learn(case, trained_case):
    _, merged, _, _ = case
    trained, _ = trained_case
    for old, new in zip(merged.model.layers, trained.layers, strict=True):
        same = all(np.array_equal(a, b) for a, b in zip(old.get_weights(), new.get_weights(), strict=True))
        assert same == ("_merged" not in new.name), new.name
        assert new.trainable == old.trainable


def test_a_harmful_training_is_not_kept(case):
    model, merged, images, names = case
    result, told = reconstruct(merged.model, model, names, images, steps=5, learning_rate=10.0)
    assert not told.kept and told.after >= told.before
    assert result is merged.model


def test_a_gain_that_two_images_make_is_no_gain():
    """A draw of 60 held-out images, two of which lose most: the mean falls by a quarter, and tells nothing."""
    rng = np.random.default_rng(0)
    before = 0.01 * rng.uniform(size=60)
    before[:2] = 1.0
    after = before + 0.002 * rng.uniform(size=60)
    after[0] = 0.4
    assert after.sum() < 0.8 * before.sum()
    assert not reconstructing._is_surely_less(after, before)
    assert reconstructing._is_surely_less(before - 0.005, before)


def test_progress_counts_steps(case):
    model, merged, images, names = case
    seen = []
    reconstruct(merged.model, model, names, images, steps=3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3, "reconstruct"), (2, 3, "reconstruct"), (3, 3, "reconstruct")]
