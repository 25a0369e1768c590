"""Steps for the accuracy of integers, on real files: what they promise, and that nothing else changes."""

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import tflite_export
from tests import zoo
from tests.export.conftest import randomise, some_images
from tests.export.test_convert import keras_outputs, signal_to_noise_db
from tflite_export.clean import Purpose, clean_model
from tflite_export.equalization import equalize
from tflite_export.layerwise import OperatorFile, Walk, real_values
from tflite_export.post_training import _best_range, correct_biases


def walk_to_the_end(path, images) -> np.ndarray:
    file = OperatorFile(path.read_bytes())
    tensor = file.graph.tensors[file.graph.inputs[0]]
    stored = images
    if tensor.scales:
        stored = np.clip(np.round(images / tensor.scales[0]) + tensor.zero_points[0], -128, 127).astype("int8")
    walk = Walk(file, {file.graph.inputs[0]: stored[:, None]})
    for number in range(len(file.graph.operators)):
        walk.advance(number)
    assert set(walk.values) == set(file.graph.outputs), "values that nobody reads any more are let go"
    return walk.values[file.graph.outputs[0]][:, 0]


def test_operators_run_one_by_one_are_the_whole_file(exported, images):
    for scheme in ("float32", "int8"):
        path = exported[scheme].path
        interpreter = Interpreter(model_path=str(path))
        interpreter.allocate_tensors()
        (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
        found = walk_to_the_end(path, images[:4])
        scale, zero = source["quantization"]
        for image, output in zip(images, found, strict=False):
            stored = image if not scale else np.clip(np.round(image / scale) + zero, -128, 127).astype("int8")
            interpreter.set_tensor(source["index"], stored[None])
            interpreter.invoke()
            whole = interpreter.get_tensor(target["index"])[0]
            # Integers are rounded the same way; floats are added in another order where operators were fused.
            assert np.abs(whole.astype(float) - output).max() <= (0 if scale else 1e-5)


def test_values_per_channel_are_real_along_their_axis():
    stored = np.array([[2, 4], [6, 8]], np.int8)
    tensor = tflite_export.flatbuffer.Tensor("w", (2, 2), "int8", True, (0.5, 0.25), (0, 4), 1)
    assert real_values(stored, tensor).tolist() == [[1.0, 0.0], [3.0, 1.0]]
    assert real_values(stored[None], tensor).tolist() == [[[1.0, 0.0], [3.0, 1.0]]]


def largest_difference(model, other, inputs) -> float:
    pairs = zip(zoo.outputs_of(model, inputs), zoo.outputs_of(other, inputs), strict=True)
    return max(float(np.abs(have - want).max() / np.abs(want).max()) for want, have in pairs)


@pytest.mark.parametrize("name", sorted({*zoo.ZOO} - {"half"}))
def test_equalized_networks_compute_the_same(name):
    model, _ = clean_model(zoo.shared(name), Purpose(integer=True))
    inputs = zoo.inputs_of(model)
    equalized, _ = equalize(model, [np.asarray(one) for one in keras.tree.flatten(inputs)])
    assert largest_difference(model, equalized, inputs) <= 1e-5


def uneven(activation: str = "relu") -> keras.Model:
    """Channels of a residual stream that differ in range by a factor of hundreds."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(16, 3, padding="same", activation=activation, name="stem")(inputs)
    y = layers.DepthwiseConv2D(3, padding="same", activation=activation, name="depthwise")(x)
    x = layers.Add(name="add")([x, layers.Conv2D(16, 1, name="project")(y)])
    x = layers.Activation(activation)(layers.Conv2D(24, 3, name="last")(x))
    model = randomise(keras.Model(inputs, layers.Dense(10, name="logits")(layers.GlobalAveragePooling2D()(x))))
    scale = np.exp(np.random.default_rng(0).uniform(-3, 3, 16)).astype("float32")
    if activation == "relu":
        for name in ("stem", "project"):
            layer = model.get_layer(name)
            layer.set_weights([weight * scale for weight in layer.get_weights()])
        for name in ("depthwise", "last"):
            kernel, bias = model.get_layer(name).get_weights()
            model.get_layer(name).set_weights([kernel / scale[:, None], bias])
    return model


def test_a_whole_residual_stream_is_equalized_and_int8_gains(export, tmp_path):
    model, images = uneven(), some_images(40, shape=(12, 12, 3))
    equalized, step = equalize(model, [images])
    assert step.done == ("stem", "depthwise", "last") and step.refused == ()
    assert largest_difference(model, equalized, images) <= 1e-5
    wanted = keras_outputs(model, images)
    decibels = {}
    for steps in ((), ("equalize",)):
        result = export(
            model, tmp_path / f"{len(steps)}.tflite", quantize="int8", calibration=images, post_training=steps
        )
        assert [one.name for one in result.steps] == list(steps)
        decibels[steps] = signal_to_noise_db(wanted, tflite_export.run_tflite(result.path, images))
    assert decibels["equalize",] > decibels[()] + 6


def test_relu6_is_equalized_with_care():
    model, images = uneven("relu6"), some_images(40, shape=(12, 12, 3))
    kernel, bias = model.get_layer("stem").get_weights()
    # Half of the channels are clipped, the others are small.
    size = np.where(np.arange(16) % 2, 20.0, 0.1)
    model.get_layer("stem").set_weights([kernel * size, bias * size])
    equalized, step = equalize(model, [images])
    assert "stem" in step.done
    assert largest_difference(model, equalized, images) <= 1e-5
    now = equalized.get_layer("stem").get_weights()[0]
    ratio = np.abs(now).max(axis=(0, 1, 2)) / np.abs(kernel * size).max(axis=(0, 1, 2))
    assert np.allclose(ratio[1::2], 1) and (ratio[::2] > 1.05).all()


def test_what_is_not_homogeneous_is_told():
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(4, 3, activation="swish", name="one")(inputs)
    x = layers.Conv2D(4, 3, name="two")(x)
    model = randomise(keras.Model(inputs, layers.Conv2D(4, 3, name="three")(layers.Softmax(name="soft")(x))))
    same, step = equalize(model, [some_images(4, shape=(9, 9, 3))])
    assert same is model and step.done == ()
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    model = keras.Model(inputs, layers.Conv2D(4, 1)(shared(shared(inputs))))
    same, step = equalize(model, [some_images(4, shape=(9, 9, 3))])
    assert same is model and step.done == ()


def test_corrected_biases_undo_a_shift_that_was_put_in(export, model, images, tmp_path):
    plain, exact = tmp_path / "int8.tflite", tmp_path / "float32.tflite"
    export(model, exact)
    export(model, plain, quantize="int8", calibration=images, post_training=())
    broken = OperatorFile(plain.read_bytes())
    rng = np.random.default_rng(0)
    for operator in broken.graph.operators:
        if operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            bias = broken.constant(operator.inputs[2])
            broken.set_constant(operator.inputs[2], bias + rng.integers(-2_000, 2_000, bias.shape).astype(np.int32))
    corrected, step = correct_biases(bytes(broken.data), exact.read_bytes(), {"image": images})
    assert len(step.done) == 4 and step.refused == ()
    wanted = keras_outputs(model, images)

    def decibels(data: bytes) -> float:
        path = tmp_path / "judged.tflite"
        path.write_bytes(data)
        return signal_to_noise_db(wanted, tflite_export.run_tflite(path, images))

    before = decibels(plain.read_bytes())
    assert decibels(bytes(broken.data)) < before - 6
    assert decibels(corrected) > before - 1


def test_a_corrected_file_differs_in_its_biases_alone(export, model, images, tmp_path):
    files = []
    for steps in (("clip_mse",), ("clip_mse", "correct_bias")):
        path = tmp_path / f"{len(steps)}.tflite"
        export(model, path, quantize="int8", calibration=images, post_training=steps)
        files.append(OperatorFile(path.read_bytes()))
    first, second = files
    assert len(first.data) == len(second.data)
    for index, tensor in enumerate(first.graph.tensors):
        if tensor.constant and tensor.dtype != "int32":
            assert np.array_equal(first.constant(index), second.constant(index))


def test_an_outlier_among_the_calibration_images_is_clipped(export, model, images, tmp_path):
    odd = np.concatenate([images, 12 * images[:1]])
    wanted = keras_outputs(model, images)
    decibels, scales = {}, {}
    for steps in ((), ("measure_ranges",), ("clip_mse",), ("clip_percentile",)):
        path = tmp_path / f"{'_'.join(steps)}.tflite"
        export(model, path, quantize="int8", calibration=odd, post_training=steps)
        decibels[steps] = signal_to_noise_db(wanted, tflite_export.run_tflite(path, images))
        (graph,) = tflite_export.read_flatbuffer(path).subgraphs
        (scales[steps],) = (one.scales[0] for one in graph.tensors if "depthwise_relu" in one.name and not one.constant)
    # The image and the logits keep their ranges, so that little is won here; what matters is that nothing is lost.
    assert min(decibels.values()) > decibels[()] - 1.5, decibels
    assert scales["clip_percentile",] < 0.95 * scales["measure_ranges",], scales
    assert scales["clip_mse",] < scales["measure_ranges",], scales


def test_measured_ranges_are_those_of_the_layers(export, model, images, tmp_path):
    """The converter's own calibration gives the input of the Add the range of the sum: four times too wide."""
    widths = {}
    for steps in ((), ("measure_ranges",)):
        path = tmp_path / f"{len(steps)}.tflite"
        export(model, path, quantize="int8", calibration=images, post_training=steps)
        (graph,) = tflite_export.read_flatbuffer(path).subgraphs
        (add,) = (one for one in graph.operators if one.name == "ADD")
        widths[steps] = [255 * graph.tensors[i].scales[0] for i in add.inputs if "project" in graph.tensors[i].name]
    values = keras_outputs(keras.Model(model.input, model.get_layer("project").output), images)
    assert widths["measure_ranges",] == [pytest.approx(float(np.ptp(values)), rel=1e-3)]
    assert widths[()][0] > 1.5 * widths["measure_ranges",][0]


def test_ranges_hold_zero_and_stay_inside_what_was_seen():
    rng = np.random.default_rng(0)
    for values in (rng.normal(0, 1, 9_999), np.abs(rng.normal(0, 1, 9_999)), rng.normal(3, 0.1, 9_999)):
        low, high = min(values.min(), 0), values.max()
        for method in ("clip_mse", "clip_percentile"):
            first, last = _best_range(values, low, high, method)
            assert low <= first <= 0 < last <= high
        first, last = _best_range(values, low, high, "clip_mse")

        def error(low, high, values=values):
            step = (high - low) / 255
            zero = np.round(-low / step)
            return np.square((np.clip(np.round(values / step) + zero, 0, 255) - zero) * step - values).sum()

        assert error(first, last) <= 1.02 * error(low, high)


def test_unknown_steps_are_refused(export, model, images, tmp_path):
    for steps, message in (
        (("sharpen",), "must be a sequence of"),
        ("equalize", "must be a sequence of"),
        (("clip_mse", "clip_percentile"), "takes one of"),
    ):
        with pytest.raises(tflite_export.OptionError, match=message):
            export(model, tmp_path / "m.tflite", quantize="int8", calibration=images, post_training=steps)
    with pytest.raises(tflite_export.OptionError, match="needs the norms folded"):
        export(
            model,
            tmp_path / "m.tflite",
            quantize="int8",
            calibration=images,
            clean=False,
            post_training=["equalize"],
        )
