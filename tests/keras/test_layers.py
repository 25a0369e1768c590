"""Blend layers: both ends exact, the step inside the graph, saved and loaded, on TensorFlow and JAX."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from updp_tf.errors import ScheduleError
from updp_tf.layers import (
    ActivationBlend,
    BlockBlend,
    BorderRing,
    GateBlend,
    InteriorNormalization,
    NormBlend,
    NormToBatch,
    TailBlend,
    TapsBlend,
)
from updp_tf.schedule import Schedule

RNG = np.random.default_rng(0)
IMAGES = (3 * RNG.normal(size=(4, 9, 7, 6))).astype("float32")
WINDOW = {"begin": 0.0, "end": 0.5, "total_steps": 8}


def randomised(layer):
    """Weights that are none of Keras' first ones, but for the counters."""
    for variable in layer.variables:
        if "int" not in str(variable.dtype):
            low, high = (0.5, 2.0) if "variance" in variable.path or "rate" in variable.path else (-1.0, 1.0)
            variable.assign(RNG.uniform(low, high, variable.shape))
    return layer


def built(layer, *shapes):
    layer.build(shapes[0] if len(shapes) == 1 else list(shapes))
    return randomised(layer)


def at(layer, step):
    layer.step.assign(step)
    return layer


def array(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


CASES = {
    "activation": (lambda **o: ActivationBlend(layers.ReLU(max_value=6.0), **o), 1),
    "other activation": (lambda **o: ActivationBlend(layers.Activation("gelu"), layers.Activation("relu"), **o), 1),
    "prelu": (lambda **o: ActivationBlend(layers.PReLU(shared_axes=[1, 2]), **o), 1),
    "layer norm": (lambda **o: NormBlend(layers.LayerNormalization(epsilon=1e-6), **o), 1),
    "layer norm without scale": (lambda **o: NormBlend(layers.LayerNormalization(scale=False, center=False), **o), 1),
    "group norm": (lambda **o: NormBlend(layers.GroupNormalization(3), **o), 1),
    "rms norm": (lambda **o: NormBlend(layers.RMSNormalization(), **o), 1),
    "norm to batch": (
        lambda **o: NormToBatch(layers.LayerNormalization(), layers.BatchNormalization(), **o),
        1,
    ),
    "taps": (lambda **o: TapsBlend(layers.Conv2D(5, 3, strides=2, padding="same"), **o), 1),
    "depthwise taps": (lambda **o: TapsBlend(layers.DepthwiseConv2D(5, use_bias=False), **o), 1),
    "tail": (lambda **o: TailBlend(layers.ReLU(), **o), 1),
    "ring": (lambda **o: BorderRing((1, 2, 0, 1), **o), 1),
    "gate": (lambda **o: GateBlend(**o), 2),
    "block": (lambda **o: BlockBlend(**o), 2),
}


def case(name, **options):
    make, n = CASES[name]
    layer = make(**{**WINDOW, **options})
    reads = [IMAGES] if n == 1 else [IMAGES, IMAGES[::-1] * 0.7]
    if name == "gate":
        reads[1] = RNG.uniform(size=(4, 1, 1, 6)).astype("float32")
    return built(layer, *(one.shape for one in reads)), reads[0] if n == 1 else reads


def stock(name, layer, x):
    """What was there, by Keras and NumPy."""
    if name == "gate":
        return x[0] * x[1]
    if name == "block":
        return x[0]
    if name == "tail":
        return x
    if name == "ring":
        inside = np.zeros_like(x)
        inside[:, 1:-2, :-1] = x[:, 1:-2, :-1]
        return inside
    return array(layer.layer(x))


def linear(name, layer, x):
    """What takes its place, in float64."""
    weights = {variable.path.split("/")[-1]: array(variable).astype("float64") for variable in layer.variables}
    if name in ("activation", "prelu"):
        return x * weights["slope"] + weights["offset"]
    if name in ("other activation", "tail"):
        return np.maximum(x, 0)
    if name.startswith("layer norm"):
        gamma, beta = weights.get("gamma", 1.0), weights.get("beta", 0.0)
        return weights["rate"] * (x - x.mean(-1, dtype="float64", keepdims=True)) * gamma + beta
    if name == "group norm":
        return weights["rate"] * (x - weights["centre"]) * weights["gamma"] + weights["beta"]
    if name == "rms norm":
        return weights["rate"] * x * weights["scale"]
    if name == "norm to batch":
        return array(layer.target(x, training=False))
    if name == "gate":
        return x[0] * weights["mean"]
    if name == "block":
        return x[1]
    if name == "ring":
        return x
    kernel = array(layer.layer.kernel).copy()
    centre = kernel[kernel.shape[0] // 2, kernel.shape[1] // 2].copy()
    kernel[:] = 0
    kernel[kernel.shape[0] // 2, kernel.shape[1] // 2] = centre
    clone = type(layer.layer).from_config(layer.layer.get_config())
    clone.build(x.shape)
    clone.set_weights([kernel, *layer.layer.get_weights()[1:]])
    return array(clone(x))


@pytest.mark.parametrize("name", CASES)
def test_blend_one_is_what_was_there_and_blend_zero_what_takes_its_place(name):
    layer, x = case(name)
    np.testing.assert_array_equal(array(at(layer, 0)(x)), stock(name, layer, x))
    np.testing.assert_allclose(array(at(layer, 4)(x)), linear(name, layer, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_between_the_ends_the_two_are_mixed(name):
    layer, x = case(name, shape="linear")
    mixed = 0.75 * stock(name, layer, x) + 0.25 * linear(name, layer, x)
    np.testing.assert_allclose(array(at(layer, 1)(x)), mixed, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_layers_survive_saving(name, tmp_path):
    layer, x = case(name, block="b", site={"nodes": ["a"], "join": None})
    reads = [x] if isinstance(x, np.ndarray) else x
    inputs = [keras.Input(one.shape[1:]) for one in reads]
    model = keras.Model(inputs, layer(inputs[0] if len(inputs) == 1 else inputs))
    at(layer, 3)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    again = next(one for one in loaded.layers if type(one) is type(layer))
    assert (again.block, again.site, again.blend) == (layer.block, layer.site, layer.blend)
    np.testing.assert_array_equal(array(loaded(reads)), array(model(reads)))


def test_the_blend_follows_the_schedule_step_by_step():
    schedule = Schedule(total_steps=8, until=0.5)
    layer, x = case("activation")
    for step in range(8):
        want = schedule.blend(step) * stock("activation", layer, x)
        want = want + (1 - schedule.blend(step)) * linear("activation", layer, x)
        assert layer.blend == pytest.approx(schedule.blend(step), abs=1e-6)
        np.testing.assert_allclose(array(layer(x, training=True)), want, rtol=1e-4, atol=1e-4)
    assert int(layer.step) == 8
    layer(x, training=False)
    assert int(layer.step) == 8


def test_a_function_traced_before_the_schedule_was_known_follows_it():
    layer, x = case("activation", total_steps=None)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    np.testing.assert_array_equal(model.predict(x, verbose=0), stock("activation", layer, x))
    layer.set_total_steps(8)
    at(layer, 4)
    np.testing.assert_allclose(model.predict(x, verbose=0), linear("activation", layer, x), rtol=1e-5, atol=1e-5)


def test_training_without_a_length_raises():
    layer, x = case("activation", total_steps=None)
    with pytest.raises(ScheduleError, match="how long the training is"):
        layer(x, training=True)


def test_learned_blends_have_gradients_a_penalty_and_grow_hard():
    layer, x = case("activation", learned=True, per_channel=True, penalty=0.5)
    layer.theta.assign(np.linspace(-1, 1, 6))
    loose, hard = array(at(layer, 0)._blend()), array(at(layer, 8)._blend())
    np.testing.assert_allclose(loose, 1 / (1 + np.exp(-np.linspace(-1, 1, 6))), rtol=1e-5)
    assert np.abs(hard - 0.5).min() > np.abs(loose - 0.5).min()
    at(layer, 0)(x, training=True)
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(0.5 * loose.mean(), rel=1e-5)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    model.compile("sgd", "mse")
    before = array(layer.theta).copy()
    model.train_on_batch(x, np.zeros_like(x))
    assert (array(layer.theta) != before).all()


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"renorm": True}])
def test_inside_the_ring_is_what_the_stock_layer_makes_of_it_alone(options):
    shape = (None, None, None, 6)
    layer = built(InteriorNormalization((2, 1, 1, 2), momentum=0.5, **options), shape)
    stock_layer = built(keras.layers.BatchNormalization(momentum=0.5, **options), shape)
    rng = np.random.default_rng(1)
    layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    stock_layer.set_weights(layer.get_weights())
    for training in (True, False):
        inside = array(layer(IMAGES, training=training))[:, 2:-1, 1:-2]
        want = array(stock_layer(IMAGES[:, 2:-1, 1:-2], training=training))
        np.testing.assert_allclose(inside, want, rtol=1e-4, atol=1e-5)
    for have, weight in zip(layer.get_weights(), stock_layer.get_weights(), strict=True):
        np.testing.assert_allclose(have, weight, rtol=1e-5)


def test_statistics_come_from_inside_the_ring():
    layer = built(InteriorNormalization((2, 1, 1, 2), momentum=0.0), IMAGES.shape)
    inside = IMAGES[:, 2:-1, 1:-2].reshape(-1, 6)
    layer(IMAGES, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), inside.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), inside.var(0), rtol=1e-4)


def test_half_precision():
    layer, x = case("activation", dtype="mixed_float16")
    y = at(layer, 2)(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    mixed = 0.5 * (stock("activation", layer, x) + linear("activation", layer, x))
    np.testing.assert_allclose(array(y), mixed, rtol=2e-2, atol=5e-2)


FIT = """
import keras, numpy as np
from keras import layers
from updp_tf.layers import ActivationBlend
x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
for options in ({"jit_compile": False}, {"jit_compile": True}, {"steps_per_execution": 4}):
    blend = ActivationBlend(layers.ReLU(), begin=0.0, end=0.5, total_steps=16)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6), blend, layers.Dense(1)])
    model.compile("sgd", "mse", **options)
    model.fit(x, x[:, :1], batch_size=8, epochs=1, verbose=0)
    assert int(blend.step) == 8, (options, int(blend.step))
    assert blend.blend == 0.0
    model.fit(x, x[:, :1], batch_size=8, epochs=1, verbose=0)
    want = x @ np.asarray(model.layers[0].kernel) + np.asarray(model.layers[0].bias)
    want = want * np.asarray(blend.slope) + np.asarray(blend.offset)
    want = want @ np.asarray(model.layers[2].kernel) + np.asarray(model.layers[2].bias)
    assert np.abs(model.predict(x, verbose=0) - want).max() < 1e-4
print("ok")
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_fit_advances_the_step_on_every_backend(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FIT], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("ok\n"), done.stderr[-2000:]
