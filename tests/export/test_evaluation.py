"""Accuracies, agreement and divergence of real files, against the same computed by hand."""

import json

import flatbuffers
import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated

import tflite_export
from tests.export.conftest import CLASSES, SHAPE
from tflite_export import DataError, DeviceError, FlatbufferError, OptionError, evaluate, run_tflite
from tflite_export.evaluation import _mean_kl
from tflite_export.flatbuffer import Tensor
from tflite_export.interpreter import dequantize, quantize


@pytest.fixture(scope="module")
def logits(model, images) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(images, training=False))


@pytest.fixture(scope="module")
def labels(logits) -> np.ndarray:
    """The model's own first choice for even images, its third for odd ones."""
    order = np.argsort(-logits, axis=1)
    return np.where(np.arange(len(logits)) % 2, order[:, 2], order[:, 0])


def test_accuracy_and_its_standard_error(exported, images, labels):
    seen = []
    result = evaluate(exported["float32"].path, images, labels, top=(1, 3, 50), progress=lambda *s: seen.append(s))
    assert result.accuracy == {1: 0.5, 3: 1.0}
    assert result.top1 == 0.5
    assert result.standard_error == {1: pytest.approx((0.25 / 32) ** 0.5), 3: 0}
    assert result.agreement is result.mean_kl is None
    assert [done for done, _, _ in seen] == [16, 32] and seen[-1][1] == 32
    assert json.loads(json.dumps(result.as_json()))["accuracy"] == {"1": 0.5, "3": 1.0}
    assert "top-1 50.0 % (+- 8.8)" in str(result)


def test_one_hot_labels_and_columns_mean_the_same(exported, images, labels):
    path = exported["float32"].path
    expected = evaluate(path, images, labels)
    assert evaluate(path, images, np.eye(CLASSES)[labels]) == expected
    assert evaluate(path, images, labels[:, None].astype("uint8")) == expected


def test_agreement_and_divergence_from_a_reference(exported, images, labels, logits):
    same = evaluate(exported["float32"].path, images, labels, reference=logits)
    assert same.agreement == 1
    assert same.mean_kl == pytest.approx(0, abs=1e-6)
    p = np.asarray(keras.ops.softmax(logits), "float64")
    assert evaluate(exported["float32"].path, images, labels, reference=p).mean_kl == pytest.approx(0, abs=1e-6)
    shifted = np.roll(logits, 1, axis=1)
    other = evaluate(exported["float32"].path, images, labels, reference=shifted)
    q = np.roll(p, 1, axis=1)
    assert other.mean_kl == pytest.approx(float(np.mean(np.sum(q * np.log(q / p), axis=1))), rel=1e-4)
    assert other.agreement == 0
    int8 = evaluate(exported["int8"].path, images, labels, reference=logits)
    assert 1e-6 < int8.mean_kl < 0.02 and int8.agreement > 0.8


def test_probabilities_that_int8_rounds_to_zero_stay_finite(export, tmp_path, images):
    image = keras.Input(SHAPE, name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(40, 3, name="conv")(image))
    model = keras.Model(image, keras.layers.Softmax()(x * 30))
    path = export(model, tmp_path / "m.tflite", quantize="int8", calibration=images).path
    outputs = run_tflite(path, images)
    assert (outputs == 0).any()
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    result = evaluate(path, images, expected.argmax(axis=1), reference=expected)
    assert 0 < result.mean_kl < 0.2


def test_divergence_of_flat_int8_probabilities_is_that_of_the_rounding():
    logits = np.random.default_rng(0).normal(0, 1, (50, 1000))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rounded = np.round(256 * p) / 256
    assert rounded.sum(axis=1).max() < 0.7, "most classes are rounded to 0"
    assert _mean_kl(p, p) == pytest.approx(0, abs=1e-12)
    assert _mean_kl(p, rounded) < 0.6  # spread evenly; with 1e-6 in place of each zero it would be 3
    assert _mean_kl(np.log(p), rounded) == pytest.approx(_mean_kl(p, rounded))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_outputs(exported, images, threads):
    many = np.tile(images, (3, 1, 1, 1))
    found = run_tflite(exported["int8"].path, many, threads=threads)
    np.testing.assert_array_equal(found, np.tile(run_tflite(exported["int8"].path, images, threads=1), (3, 1)))


def test_integer_images_are_values_not_steps(export, model, exported, images, tmp_path):
    whole = np.round(images)
    wanted = run_tflite(exported["float32"].path, whole)
    np.testing.assert_array_equal(run_tflite(exported["float32"].path, whole.astype(np.int8)), wanted)
    found = run_tflite(exported["int8"].path, whole.astype(np.int8))
    np.testing.assert_array_equal(found, run_tflite(exported["int8"].path, whole))


def test_quantize_rounds_and_clips():
    tensor = Tensor("x", (5,), "int8", False, scales=(0.5,), zero_points=(10,))
    stored = quantize(np.array([0, 0.9, -0.9, -1000, 1000]), tensor)
    np.testing.assert_array_equal(stored, np.array([10, 12, 8, -128, 127], np.int8))
    np.testing.assert_allclose(dequantize(stored, tensor), [0, 1, -1, -69, 58.5])


def test_several_outputs_must_be_named(export, tmp_path):
    x = keras.Input((4,), name="x")
    model = keras.Model(x, [keras.layers.Dense(2, name="a")(x), keras.layers.Dense(3, name="b")(x)])
    path = export(model, tmp_path / "m.tflite").path
    values = np.ones((3, 4), "float32")
    assert run_tflite(path, values, output="b").shape == (3, 3)
    for wrong in (None, "c"):
        with pytest.raises(DataError, match=r"has the outputs .*name one of them"):
            run_tflite(path, values, output=wrong)


def test_no_images_give_no_outputs(exported, images):
    assert run_tflite(exported["int8"].path, images[:0]).shape == (0, CLASSES)


def test_bad_input(exported, images, labels, tmp_path):
    path = exported["float32"].path
    with pytest.raises(DataError, match="one length above 0"):
        evaluate(path, images, labels[:-1])
    with pytest.raises(DataError, match="labels range from 0 to 10, but the file has 10 classes"):
        evaluate(path, images, np.arange(32) % 11)
    with pytest.raises(DataError, match="class indices of shape"):
        evaluate(path, images, labels.astype(float))
    with pytest.raises(DataError, match=r"reference has shape \(32, 3\)"):
        evaluate(path, images, labels, reference=np.ones((32, 3)))
    with pytest.raises(DataError, match=r"takes one image of shape \(1, 17, 15, 3\) at a time"):
        run_tflite(path, images[:, :-1])
    with pytest.raises(DataError, match=r"has the inputs \['image'\]"):
        run_tflite(path, {"picture": images})
    with pytest.raises(OptionError, match="threads must be at least 1"):
        run_tflite(path, images, threads=0)
    with pytest.raises(OptionError, match="top must hold"):
        evaluate(path, images, labels, top=(0,))
    with pytest.raises(FlatbufferError, match="No such file"):
        run_tflite(tmp_path / "none.tflite", images)


def test_files_for_another_runtime_are_refused(edgetpu_folder):
    path = edgetpu_folder / "mobilenet_v1_0.25_128_quant_edgetpu.tflite"
    with pytest.raises(DeviceError, match=r"cannot run .*custom operators \['edgetpu-custom-op'\]"):
        run_tflite(path, np.zeros((1, 128, 128, 3)))
    assert tflite_export.read_flatbuffer(path).custom_operators


def test_operators_that_fail_while_they_run_are_our_error(export, tmp_path):
    x = keras.Input((4,), name="x")
    path = export(keras.Model(x, keras.layers.Dense(3, name="d")(x)), tmp_path / "m.tflite").path
    file = schema_py_generated.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    for tensor in file.subgraphs[0].tensors:
        tensor.buffer = 0  # the empty buffer: no weights
    builder = flatbuffers.Builder()
    builder.Finish(file.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    with pytest.raises(DeviceError, match=r"failed while it ran '.*m\.tflite': Input tensor \d lacks data\."):
        run_tflite(path, np.ones((1, 4), "float32"))
