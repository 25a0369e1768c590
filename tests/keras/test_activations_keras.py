"""Every function of `updp_tf.activations` has the values, parameters and defaults of Keras' own."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from updp_tf.activations import ACTIVATIONS, ALIASES, Activation, make_activation

# Kinks and thresholds of every function lie on this grid or between two of its points.
Z = np.concatenate([np.linspace(-8, 8, 161), [-40.0, -0.001, 0.001, 40.0]])


# TensorFlow rounds the constants of some functions (0.2, sqrt(2)) to float32, a relative error of up to 6e-8.
TOLERANCE = {"rtol": 1e-7, "atol": 1e-8}


def values(function) -> np.ndarray:
    return keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(Z, dtype="float64")))


@pytest.mark.parametrize("name", [*ACTIVATIONS, *ALIASES])
def test_defaults_are_those_of_keras_activations(name: str) -> None:
    np.testing.assert_allclose(Activation(name)(Z), values(getattr(keras.activations, name)), **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("relu", {"negative_slope": 0.2}),
        ("relu", {"max_value": 2.05}),
        ("relu", {"max_value": 6.0, "negative_slope": 0.1}),
        ("relu", {"threshold": 1.05}),
        ("relu", {"threshold": 1.0}),
        ("relu", {"threshold": 1.05, "negative_slope": 0.3, "max_value": 3.05}),
        ("relu", {"threshold": 2.0, "max_value": 1.0, "negative_slope": 0.5}),
        ("leaky_relu", {"negative_slope": 0.3}),
        ("elu", {"alpha": 0.4}),
        ("gelu", {"approximate": True}),
    ],
)
def test_parameters_are_those_of_keras_activations(name: str, parameters: dict) -> None:
    expected = values(lambda z: getattr(keras.activations, name)(z, **parameters))
    np.testing.assert_allclose(make_activation(name, **parameters)(Z), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("layer", "activation"),
    [
        (lambda: keras.layers.ReLU(dtype="float64"), Activation("relu")),
        (
            lambda: keras.layers.ReLU(max_value=4.05, negative_slope=0.1, threshold=0.55, dtype="float64"),
            make_activation("relu", max_value=4.05, negative_slope=0.1, threshold=0.55),
        ),
        (lambda: keras.layers.LeakyReLU(dtype="float64"), make_activation("leaky_relu", negative_slope=0.3)),
        (lambda: keras.layers.ELU(alpha=0.7, dtype="float64"), make_activation("elu", alpha=0.7)),
    ],
)
def test_layers_are_the_same_functions(layer, activation: Activation) -> None:
    np.testing.assert_allclose(activation(Z), values(layer()), **TOLERANCE)
