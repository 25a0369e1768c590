"""Every family of keras.applications narrows: it builds, runs as the oracle says, trains, saves and loads."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests import zoo
from tests.isomorphic.narrow_zoo import logits_of
from tests.isomorphic.oracle import check_against_oracle
from updp_tf.graph import build_model, read_graph
from updp_tf.isomorphic.cutting import cut_units
from updp_tf.isomorphic.dependency import find_dependencies
from updp_tf.isomorphic.importance import group_scores
from updp_tf.isomorphic.scopes import choose_units

FAMILIES = {
    "MobileNet": 40,
    "MobileNetV2": 40,
    "MobileNetV3Small": 40,
    "EfficientNetB0": 40,
    "EfficientNetV2B0": 40,
    "VGG16": 32,
    "ResNet50": 40,
    "ResNet50V2": 40,
    "ConvNeXtTiny": 40,
    "Xception": 75,
    "DenseNet121": 40,
    "InceptionV3": 75,
    "NASNetMobile": 40,
    "InceptionResNetV2": 75,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_narrow_by_a_quarter_and_by_half(family, tmp_path):
    keras.utils.clear_session(free_memory=True)
    size = FAMILIES[family]
    model = getattr(keras.applications, family)(weights=None, input_shape=(size, size, 3), classes=10)
    model = logits_of(zoo.randomise(model))
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")
    dependencies = find_dependencies(read_graph(model))
    scores = group_scores(dependencies, "l2")
    for ratio in (0.25, 0.5):
        cut = choose_units(dependencies.groups, scores, ratio, scope="isomorphic", round_to=8)
        narrowed = build_model(cut_units(dependencies, cut))
        error = check_against_oracle(dependencies, cut, narrowed, x)
        print(family, ratio, model.count_params(), narrowed.count_params(), f"{error:.1e}")
        assert narrowed.count_params() < (1 - ratio / 2) * model.count_params()
    narrowed.save(tmp_path / "narrowed.keras")
    loaded = keras.saving.load_model(tmp_path / "narrowed.keras")
    wanted = keras.ops.convert_to_numpy(narrowed(x, training=False))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loaded(x, training=False)), wanted, rtol=1e-3, atol=1e-3)
    loaded.compile("sgd", "mse")
    loaded.train_on_batch(x, np.zeros((2, 10)))
