"""Errors layer by layer: against what the whole files compute, and which layer is told to hurt."""

import json

import keras
import numpy as np
import pytest

import tflite_export
from tests.export.conftest import CLASSES, some_images
from tests.export.test_convert import keras_outputs, signal_to_noise_db
from tflite_export import DataError, OptionError, OutputError, compare
from tflite_export.layerwise import OperatorFile

STEPS = ("equalize", "measure_ranges", "correct_bias")


@pytest.fixture(scope="module")
def pair(worker, model, images, tmp_path_factory):
    """A float file and the int8 file that was quantized from it, equalized and corrected."""
    folder = tmp_path_factory.mktemp("pair")
    files = folder / "float.tflite", folder / "int8.tflite"
    tflite_export.export(
        model, files[1], quantize="int8", calibration=images, float_copy=files[0], post_training=STEPS, worker=worker
    )
    return files


def test_the_float_copy_computes_what_the_model_does(pair, model, images):
    wanted = keras_outputs(model, images)
    assert np.abs(tflite_export.run_tflite(pair[0], images) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_the_last_layer_has_gathered_the_error_of_the_whole_file(pair, images):
    seen = []
    found = compare(*pair, images, progress=lambda *step: seen.append(step))
    assert seen[-1][:2] == (32, 32)
    whole = [tflite_export.run_tflite(path, images) for path in pair]
    assert found.layers[-1].gathered_db == pytest.approx(signal_to_noise_db(*whole), abs=0.05)
    assert [one.operator for one in found.layers] == [
        *("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D", "ADD", "MEAN", "FULLY_CONNECTED")
    ]
    # The first layer reads the image itself: nothing has gathered before it.
    assert found.layers[0].own_db == pytest.approx(found.layers[0].gathered_db, abs=0.2)
    assert found.layers[-1].own_db > found.layers[-1].gathered_db
    assert found.skipped == ()
    assert json.loads(json.dumps(found.as_json()))["layers"][0]["operator"] == "CONV_2D"
    assert "<- 1" in str(found) and "stem_relu" in str(found)


def test_a_layer_that_was_spoiled_is_the_worst(pair, images, tmp_path):
    file = OperatorFile(pair[1].read_bytes())
    (number,) = (n for n, one in enumerate(file.graph.operators) if one.name == "DEPTHWISE_CONV_2D")
    weights = file.graph.operators[number].inputs[1]
    file.set_constant(weights, np.roll(file.constant(weights), 1, axis=-1))
    spoiled = tmp_path / "spoiled.tflite"
    spoiled.write_bytes(bytes(file.data))
    found = compare(pair[0], spoiled, images[:8])
    assert found.worst[0].operator == "DEPTHWISE_CONV_2D" and found.worst[0].own_db < 10
    before = compare(*pair, images[:8])
    for old, new in zip(before.layers, found.layers, strict=True):
        if new.operator != "DEPTHWISE_CONV_2D":
            assert new.own_db == pytest.approx(old.own_db, abs=1e-6), "its own error is not that of the layers before"


def test_a_plot_is_drawn_and_never_replaces_a_file(pair, images, tmp_path):
    found = compare(*pair, images[:4])
    found.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="exists already"):
        found.plot(tmp_path / "errors.png")


def test_what_does_not_fit_is_told(pair, images, export, tmp_path):
    with pytest.raises(DataError, match="takes images of shape"):
        compare(*pair, images[:, :5])
    image = keras.Input((17, 15, 3), name="image")
    other = keras.Model(image, keras.layers.Conv2D(4, 3, name="conv")(image), name="other")
    export(other, tmp_path / "other.tflite")
    with pytest.raises(DataError, match="no layer in common"):
        compare(tmp_path / "other.tflite", pair[1], images)
    with pytest.raises(OptionError, match="float32 files have none"):
        export(other, tmp_path / "m.tflite", float_copy=tmp_path / "f.tflite")
    with pytest.raises(OptionError, match="the same path"):
        export(other, tmp_path / "m.tflite", quantize="int8", calibration=images, float_copy=tmp_path / "m.tflite")


def test_integer_inputs_of_another_type_are_converted_on_the_way(export, images, tmp_path):
    image = keras.Input((17, 15, 3), name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, name="conv")(image))
    model = keras.Model(image, keras.layers.Dense(CLASSES)(x))
    files = tmp_path / "f.tflite", tmp_path / "u.tflite"
    export(model, files[1], quantize="int8", calibration=images, input_dtype="uint8", float_copy=files[0])
    found = compare(*files, some_images(4))
    assert [one.operator for one in found.layers][:2] == ["CONV_2D", "MEAN"]
