"""Quantization-aware training through its own process: the bridge, the ranges, the file, and the way back."""

import json
import os
import shutil

import keras
import numpy as np
import pytest

import tflite_export
from tests.export.conftest import inverted_residuals, randomise, some_images
from tests.export.test_convert import keras_outputs, signal_to_noise_db
from tflite_export import DataError, ExportError, ModelError, OptionError, OutputError, files, qat, quantize_aware


@pytest.mark.slow
def test_a_network_learns_to_live_with_int8(tmp_path):
    keras.utils.set_random_seed(0)
    model = inverted_residuals()
    images = some_images(160, shape=model.input_shape[1:])
    before = [np.array(weight) for weight in model.get_weights()]
    seen = []
    result = quantize_aware(
        model, tmp_path / "m.tflite", images, steps=60, learning_rate=1e-4, progress=lambda *step: seen.append(step)
    )
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))
    assert os.environ.get("TF_USE_LEGACY_KERAS") is None, "the switch stays in the other process"
    assert result.bridge_error <= 1e-5 and result.file_error <= 0.05
    # Calibrated ranges start close to the float network: ranges of -6 to 6 gave a distance of 0.5 here.
    assert result.loss_after < result.loss_before < 0.05 and result.loss == "probabilities"
    file = tflite_export.read_flatbuffer(result.path)
    assert {tensor.dtype for tensor in file.tensors} <= {"int8", "int32"} and file.input_names == ("image",)
    wanted = keras_outputs(model, images[:40])
    assert signal_to_noise_db(wanted, tflite_export.run_tflite(result.path, images[:40])) > 25
    # The weights that came back are those of the float network after training: close to it, and changed.
    assert signal_to_noise_db(wanted, keras_outputs(result.model, images[:40])) > 20
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in result.model.layers)
    assert seen[-1][:2] == (60, 60)
    assert json.loads(json.dumps(result.as_json()))["loss_after"] == result.loss_after


def gates_and_norms() -> keras.Model:
    """Hard-swish alone and fused into a convolution, a squeeze-and-excite gate, LayerNorms with and without gains."""
    image = keras.Input((17, 17, 3), name="image")
    x = keras.layers.Conv2D(16, 3, strides=2, activation="hard_silu", name="stem")(image)
    y = keras.layers.DepthwiseConv2D(3, padding="same")(x)
    y = keras.layers.LayerNormalization(epsilon=1e-6, name="norm")(y)
    y = keras.layers.Activation("hard_silu")(keras.layers.Conv2D(16, 1, name="mix")(y))
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = keras.layers.Conv2D(16, 1, activation="sigmoid", name="gate")(gate)
    x = keras.layers.Add()([x, keras.layers.Multiply()([y, gate])])
    x = keras.layers.LayerNormalization(scale=False, center=False, name="bare")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Dense(24, activation="gelu", name="dense")(x))
    return randomise(keras.Model(image, keras.layers.Dense(10, name="logits")(x), name="gates"))


@pytest.mark.slow
def test_gates_norms_and_hard_swish_learn_in_integers(tmp_path):
    keras.utils.set_random_seed(0)
    model, images = gates_and_norms(), some_images(160, shape=(17, 17, 3))
    result = quantize_aware(model, tmp_path / "m.tflite", images, steps=60, learning_rate=1e-4)
    assert result.bridge_error <= 1e-5 and result.file_error <= 0.05
    assert result.loss_after < result.loss_before < 0.1 and result.loss == "logits"
    file = tflite_export.read_flatbuffer(result.path)
    assert {tensor.dtype for tensor in file.tensors} <= {"int8", "int32"}
    assert file.operator_counts["HARD_SWISH"] == 2 and file.operator_counts["RSQRT"] == 2
    wanted = keras_outputs(model, images[:40])
    assert signal_to_noise_db(wanted, tflite_export.run_tflite(result.path, images[:40])) > 20
    # What was trained came back, gains and offsets of norms included.
    assert signal_to_noise_db(wanted, keras_outputs(result.model, images[:40])) > 20
    norms = [one.get_layer("norm").get_weights() for one in (model, result.model)]
    for before, after in zip(*norms, strict=True):
        assert 0 < np.abs(before - after).max() < 0.1


def dense_and_rectified() -> keras.Model:
    """What tfmot leaves in float, kernels in front of a ReLU and what reads silu, and a depthwise kernel."""
    image = keras.Input((9, 9, 3), name="image")
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2)(image)
    x = keras.layers.ReLU(6.0)(keras.layers.Conv2D(8, 1)(x))
    x = keras.layers.Activation("silu")(keras.layers.Conv2D(6, 1, activation="silu")(x))
    x = keras.layers.ReLU()(keras.layers.Dense(7)(keras.layers.Flatten()(x)))
    x = keras.layers.Activation("relu")(keras.layers.Dense(6, use_bias=False)(x))
    return randomise(keras.Model(image, keras.layers.Dense(3)(keras.layers.Dense(5, activation="relu")(x))))


@pytest.mark.slow
def test_a_file_that_rounds_otherwise_than_the_training_is_refused(tmp_path, monkeypatch):
    kept = tmp_path / "kept"

    def keep_all(file, target):
        shutil.copytree(file.parent, kept)
        files.place(file, target)

    monkeypatch.setattr(qat, "place", keep_all)
    quantize_aware(dense_and_rectified(), tmp_path / "m.tflite", some_images(40, shape=(9, 9, 3)), steps=2)
    kernels, ranges = dict(np.load(kept / "kernels.npz")), np.load(kept / "ranges.npy")
    assert len(kernels) == 7  # none is left in float, and nothing else is
    assert {one.dtype for one in tflite_export.read_flatbuffer(kept / "model.tflite").tensors} <= {"int8", "int32"}
    qat._check_steps(kept, "it")
    np.save(kept / "ranges.npy", ranges * 1.01)
    with pytest.raises(ExportError, match="of model 'it' is not the network.*: what .* writes is rounded in steps"):
        qat._check_steps(kept, "it")
    np.save(kept / "ranges.npy", ranges)
    for name, kernel in kernels.items():
        other = kernel.copy()
        other.flat[1] += 0.3 * np.abs(kernel).max() / 127
        np.savez(kept / "kernels.npz", **kernels | {name: other})
        with pytest.raises(ExportError, match="the kernel of .* has other values"):
            qat._check_steps(kept, "it")
    fake = dict(np.load(kept / "fake.npz"))
    np.savez(kept / "fake.npz", probes=fake["probes"], fake=1.3 * fake["fake"], exact=1.3 * fake["exact"])
    with pytest.raises(ExportError, match="their outputs differ by 0.2"):
        qat._file_error(kept, "it")


def with_layer(layer) -> keras.Model:
    image = keras.Input((9, 9, 3), name="image")
    return randomise(keras.Model(image, keras.layers.Flatten()(layer(keras.layers.Conv2D(4, 3)(image)))))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (keras.layers.GroupNormalization(2, name="norm"), "layer 'norm' is a GroupNormalization, which"),
        (
            keras.layers.LayerNormalization(axis=1, name="norm"),
            "'norm' normalizes over the axes .1.: here it may",
        ),
        (keras.layers.Activation("mish", name="act"), "layer 'act' applies 'mish', which"),
    ],
)
def test_layers_without_a_scheme_are_named(tmp_path, layer, message):
    with pytest.raises(ModelError, match=message):
        quantize_aware(with_layer(layer), tmp_path / "m.tflite", some_images(4, shape=(9, 9, 3)))
    assert not list(tmp_path.iterdir())


def test_bad_input_is_told_before_anything_runs(tmp_path):
    model, images = with_layer(keras.layers.ReLU()), some_images(4, shape=(9, 9, 3))
    with pytest.raises(DataError, match="takes"):
        quantize_aware(model, tmp_path / "m.tflite", images[:, :5])
    with pytest.raises(OptionError, match="steps and batch_size"):
        quantize_aware(model, tmp_path / "m.tflite", images, steps=0)
    with pytest.raises(OptionError, match="input_dtype"):
        quantize_aware(model, tmp_path / "m.tflite", images, input_dtype="int4")
    (tmp_path / "m.tflite").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        quantize_aware(model, tmp_path / "m.tflite", images)
    two = keras.Model(model.input, [model.output, model.output])
    with pytest.raises(ModelError, match="several inputs or outputs"):
        quantize_aware(two, tmp_path / "other.tflite", images)
