"""Operators that stay in float because they were measured to be noisy, on real files."""

import keras
import numpy as np
import pytest
from keras import layers

import tflite_export
from tests.export.conftest import randomise, some_images
from tests.export.test_convert import keras_outputs, signal_to_noise_db
from tflite_export import OptionError

SHAPE = (12, 12, 3)


def folded_skip() -> keras.Model:
    """A merged block with its skip folded in: a 1 next to small weights sets the step of each channel."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE, name="image")
    x = layers.Conv2D(48, 3, padding="same", activation="relu", name="stem")(inputs)
    x = layers.Activation("relu")(layers.Conv2D(48, 3, padding="same", name="folded")(x))
    x = layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))
    model = randomise(keras.Model(inputs, layers.Softmax()(x)))
    kernel, bias = model.get_layer("folded").get_weights()
    kernel *= 0.02 / kernel.std()
    kernel[1, 1] += np.eye(48)
    model.get_layer("folded").set_weights([kernel, bias])
    return model


def logits(model: keras.Model) -> keras.Model:
    return keras.Model(model.input, model.get_layer("logits").output)


def test_the_noisy_layer_alone_stays_in_float_and_the_end_gains(export, tmp_path):
    model, images, decibels = logits(folded_skip()), some_images(40, shape=SHAPE), {}
    results = {}
    for bound in (None, 35.0, 5.0):
        results[bound] = export(
            model, tmp_path / f"{bound}.tflite", quantize="int8", calibration=images, float_below_db=bound
        )
        found = tflite_export.run_tflite(results[bound].path, images)
        decibels[bound] = signal_to_noise_db(keras_outputs(model, images), found)
    mixed = results[35.0]
    ((name, measured),) = mixed.float_layers.items()
    assert "activation" in name and 30 < measured < 35 and f"'{name}' ({measured:.1f} dB)" in str(mixed)
    assert decibels[35.0] > decibels[None] + 3
    assert mixed.operators == {"CONV_2D": 2, "DEQUANTIZE": 1, "FULLY_CONNECTED": 1, "MEAN": 1, "QUANTIZE": 1}
    assert mixed.float_tensors == mixed.float_operators == (), "it was asked for"
    assert mixed.input_dtype == "int8"
    # Where nothing is as noisy as that, the file computes what it does without the option, bit for bit.
    plain, same = (tflite_export.run_tflite(results[bound].path, images) for bound in (None, 5.0))
    assert np.array_equal(plain, same) and results[5.0].float_layers == {}
    assert "no operator has less than 5 dB, the least is 3" in str(results[5.0])


def test_the_end_before_a_softmax_is_what_counts(export, tmp_path):
    images = some_images(40, shape=SHAPE)
    result = export(folded_skip(), tmp_path / "m.tflite", quantize="int8", calibration=images, float_below_db=35.0)
    assert len(result.float_layers) == 1 and result.operators["SOFTMAX"] == 1


def test_what_gains_nothing_in_float_stays_in_integers(export, tmp_path):
    # Its weights are exact in integers: all noise is that of the steps of what it reads and writes.
    inputs = keras.Input(SHAPE, name="image")
    x = layers.Conv2D(3, 1, activation="relu", use_bias=False, name="exact")(inputs)
    model = randomise(keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x))))
    model.get_layer("exact").set_weights([0.5 * np.eye(3)[None, None]])
    images = some_images(40, shape=SHAPE)
    result = export(model, tmp_path / "m.tflite", quantize="int8", calibration=images, float_below_db=45.0)
    assert result.float_layers == {} and "DEQUANTIZE" not in result.operators
    (step,) = [one for one in result.steps if one.name == "float_below_db"]
    assert len(step.refused) == 1 and "gains nothing" in step.refused[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int8", "target": "edgetpu"}, "the Edge TPU runs nothing behind the first of them"),
        ({"quantize": "int16x8"}, "float_below_db is for int8, not 'int16x8'"),
        ({"quantize": "int8", "float_below_db": 0}, "a signal over noise in dB above 0, not 0"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        tflite_export.export(
            folded_skip(), tmp_path / "m.tflite", **{"calibration": some_images(4), "float_below_db": 20.0} | options
        )
    assert not list(tmp_path.iterdir())
