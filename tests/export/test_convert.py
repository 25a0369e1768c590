"""Export through the real converter and the real interpreter: right values, stable bytes, and errors that help."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import tflite_export
from tests.export.conftest import CLASSES, SHAPE, randomise, small_model, some_images
from tflite_export import DataError, ExportError, ExportWorker, ModelError, OptionError, OutputError, export_many
from tflite_export.calibration import collect


def keras_outputs(model: keras.Model, images: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(images, training=False))


def signal_to_noise_db(expected: np.ndarray, found: np.ndarray) -> float:
    return 10 * np.log10(np.sum(expected**2) / np.sum((expected - found) ** 2))


def test_float32_equals_keras_by_the_models_own_names(model, images, exported):
    result = exported["float32"]
    runner = Interpreter(model_path=str(result.path)).get_signature_runner("serving_default")
    expected = keras_outputs(model, images)
    # The 1e-4 that float arithmetic in another order may cost; a folded norm gone wrong costs 1e-1.
    for image, wanted in zip(images[:8], expected, strict=False):
        found = runner(image=image[None])["logits"][0]
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(expected).max()
    assert result.max_error < 1e-4
    assert result.input_names == ("image",) and result.output_names == ("logits",)
    assert "MUL" not in result.operators, "the norms were not folded"


def test_int8_is_all_integers_and_close_to_keras(model, images, exported):
    result = exported["int8"]
    interpreter = Interpreter(model_path=str(result.path))
    assert interpreter.get_input_details()[0]["dtype"] == interpreter.get_output_details()[0]["dtype"] == np.int8
    assert result.float_tensors == result.float_operators == result.select_operators == ()
    expected, found = keras_outputs(model, images), tflite_export.run_tflite(result.path, images)
    # 8 bits give 48 dB on one tensor; a dozen quantized layers leave 25 to 35 dB, a wrong scale below 10.
    assert signal_to_noise_db(expected, found) > 22
    assert 0 < result.max_error < 0.15


@pytest.fixture(scope="module")
def wide_model() -> keras.Model:
    """Large enough that its weights are most of its file; small ones stay as they are in some schemes."""
    keras.utils.set_random_seed(3)
    image = keras.Input(SHAPE, name="image")
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(48, 3, strides=2)(image)))
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(96, 3, padding="same")(x)))
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    return randomise(keras.Model(image, keras.layers.Dense(CLASSES, name="logits")(pooled), name="wide"), seed=3)


@pytest.mark.parametrize(
    ("scheme", "of_float32", "decibels"), [("float16", 0.6, 55), ("dynamic", 0.4, 25), ("int16x8", 0.4, 30)]
)
def test_the_other_schemes(export, wide_model, images, tmp_path, scheme, of_float32, decibels):
    plain = export(wide_model, tmp_path / "float32.tflite")
    result = export(wide_model, tmp_path / "model.tflite", quantize=scheme, calibration=images)
    assert result.quantize == scheme and result.select_operators == result.float_tensors == ()
    assert result.size_bytes < of_float32 * plain.size_bytes
    # Rounding to 11 bits gives about 70 dB, to 8 bits in the weights alone 30 to 40 dB.
    found = tflite_export.run_tflite(result.path, images)
    assert signal_to_noise_db(keras_outputs(wide_model, images), found) > decibels
    details = Interpreter(model_path=str(result.path)).get_input_details()[0]
    assert details["dtype"] == np.dtype(result.input_dtype) == ("int16" if scheme == "int16x8" else "float32")


def test_int16x8_with_float_inputs(export, model, images, tmp_path):
    path = tmp_path / "model.tflite"
    export(model, path, quantize="int16x8", calibration=images, input_dtype="float32")
    assert Interpreter(model_path=str(path)).get_input_details()[0]["dtype"] == np.float32
    assert signal_to_noise_db(keras_outputs(model, images), tflite_export.run_tflite(path, images)) > 30


def test_all_schemes_give_the_same_bytes_in_another_process(model, images, exported, export, tmp_path):
    schemes = ("float32", "float16", "dynamic", "int8", "int16x8")
    with ExportWorker() as another:
        for scheme in schemes:
            first = export(model, tmp_path / f"{scheme}-1.tflite", quantize=scheme, calibration=images)
            again = tflite_export.export(
                model, tmp_path / f"{scheme}-2.tflite", quantize=scheme, calibration=images, worker=another
            )
            assert first.sha256 == again.sha256, scheme


def untrained(norms: int) -> keras.Model:
    inputs = keras.Input((8, 8, 3), name="image")
    x = inputs
    for _ in range(2):
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x)))
    built = keras.Model(inputs, keras.layers.Dense(3, name="logits")(keras.layers.GlobalAveragePooling2D()(x)))
    for layer in [one for one in built.layers if type(one).__name__ == "BatchNormalization"][norms:]:
        layer.moving_mean.assign([0.1, -0.2, 0.3, 0.05])
    return built


def test_norms_that_were_never_trained_are_told_before_an_integer_export(export, tmp_path):
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")
    path = tmp_path / "model.tflite"
    with pytest.raises(ModelError, match="2 BatchNormalization .* never trained.* would not load"):
        export(untrained(2), path, quantize="int16x8", calibration=images)
    assert not path.exists()
    for norms, told in ((2, "2 BatchNorm"), (1, "1 BatchNorm"), (0, "")):
        result = export(untrained(norms), path, quantize="int8", calibration=images, force=True)
        assert any(told in note for note in result.notes) if told else not any("trained" in n for n in result.notes)


def test_a_file_for_the_edge_tpu_has_one_scale_per_dense_layer_and_says_what_is_mapped(export, model, images, tmp_path):
    path = tmp_path / "model.tflite"
    result = export(model, path, quantize="int8", calibration=images, target="edgetpu")
    report = tflite_export.check_edgetpu(path)
    assert f"the Edge TPU maps {report.n_mapped} of {len(report.operators)} operators" in "".join(result.notes)
    (graph,) = tflite_export.read_flatbuffer(path).subgraphs
    (dense,) = (one for one in graph.operators if one.name == "FULLY_CONNECTED")
    assert len(graph.tensors[dense.inputs[1]].scales) == 1


def test_a_model_that_the_edge_tpu_cannot_run_is_refused(export, tmp_path):
    inputs = keras.Input((8, 8, 4), name="image")
    gelu = keras.Model(inputs, keras.layers.Activation("gelu")(inputs))
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype("float32")
    with pytest.raises(ExportError, match="the Edge TPU cannot run model .*GELU"):
        export(gelu, tmp_path / "model.tflite", quantize="int8", calibration=images, target="edgetpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("input_dtype", "extra"), [("uint8", {"QUANTIZE": 2}), ("float32", {"QUANTIZE": 1})])
def test_inputs_and_outputs_of_an_int8_file_have_the_type_asked_for(
    export, model, images, exported, tmp_path, input_dtype, extra
):
    path = tmp_path / "model.tflite"
    result = export(model, path, quantize="int8", calibration=images, input_dtype=input_dtype)
    interpreter = Interpreter(model_path=str(path))
    assert interpreter.get_input_details()[0]["dtype"] == np.dtype(input_dtype)
    assert interpreter.get_output_details()[0]["dtype"] == np.dtype(input_dtype)
    assert extra.items() <= result.operators.items()
    assert result.float_tensors == (), "what was asked for is not left over"
    found = tflite_export.run_tflite(path, images)
    step = 0.1  # about one step of the output; the inner arithmetic is the same
    assert np.abs(found - tflite_export.run_tflite(exported["int8"].path, images)).max() < step


def test_the_record_is_whole(exported):
    result = exported["int8"]
    record = json.loads(json.dumps(result.as_json()))
    assert record["path"] == str(result.path)
    assert record["sha256"] == tflite_export.read_flatbuffer(result.path).sha256
    assert record["size_bytes"] == result.path.stat().st_size
    assert set(record["versions"]) == {"tensorflow", "keras", "ai-edge-litert"}
    assert record["peak_memory_bytes"] > 100e6 and record["seconds"] > 0
    assert "int8" in str(result) and "2 CONV_2D" in str(result)


CUSTOM_LAYER = """
import os
import sys
import keras

@keras.saving.register_keras_serializable("tests")
class Doubled(keras.layers.Layer):
    def call(self, x):
        return x * 2

class Unregistered(Doubled):
    pass

class Composite(keras.layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.inner = keras.layers.Dense(3)  # named "dense", "dense_1", ... by Keras

    def call(self, x):
        print("a layer that talks on standard output")
        return self.inner(x)

class Fatal(Doubled):
    def call(self, x):
        if "pytest" not in sys.modules:  # in the worker process
            os.write(2, b"LLVM ERROR: as some converters do\\n")
            os.abort()
        return x * 2
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A module with layers of a user's own, somewhere on the parent's path."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "layers_of_a_user.py").write_text(CUSTOM_LAYER)
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.find_spec("layers_of_a_user")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "layers_of_a_user", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def second_worker():
    with ExportWorker() as started:
        yield started


def test_a_worker_that_dies_is_an_error_with_its_last_words(second_worker, custom, tmp_path):
    image = keras.Input((5, 5, 3), name="image")
    model = keras.Model(image, custom.Fatal()(image), name="fatal")
    with pytest.raises(ExportError, match=r"(?s)converted model 'fatal' was killed by signal 6.*as some converters do"):
        tflite_export.export(model, tmp_path / "model.tflite", worker=second_worker)
    assert not (tmp_path / "model.tflite").exists()


def test_bytes_are_the_same_in_another_process_and_after_another_model(
    model, images, exported, second_worker, tmp_path
):
    keras_file = tmp_path / "model.keras"
    model.save(keras_file)
    other = small_model(name="other", seed=5)
    results = export_many(
        [(other, tmp_path / "other.tflite"), (keras_file, tmp_path / "again.tflite")],
        quantize="int8",
        calibration=images,
        worker=second_worker,
    )
    assert results[1].sha256 == exported["int8"].sha256
    assert results[0].sha256 != results[1].sha256


def test_the_users_model_is_not_changed(export, tmp_path, images):
    model = small_model()
    before = [np.array(w) for w in model.get_weights()], model.to_json(), len(model.layers[1]._inbound_nodes)
    export(model, tmp_path / "model.tflite", quantize="int8", calibration=images)
    after = [np.array(w) for w in model.get_weights()], model.to_json(), len(model.layers[1]._inbound_nodes)
    assert before[1:] == after[1:]
    assert all((a == b).all() for a, b in zip(before[0], after[0], strict=True))


class Batches(keras.utils.PyDataset):
    """Images and labels in batches of 10."""

    def __init__(self, images):
        super().__init__()
        self._images = images

    def __len__(self):
        return -(-len(self._images) // 10)

    def __getitem__(self, index):
        images = self._images[10 * index : 10 * index + 10]
        return images, np.zeros(len(images))


def endless(images):
    while True:
        yield images[:10], None


def test_every_kind_of_calibration_data_gives_the_same_file(export, model, images, exported, tmp_path):
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices((images, np.zeros(len(images)))).batch(5)
    given = {
        "dataset": dataset,
        "PyDataset": Batches(images),
        "list of batches": [images[:20], images[20:]],
        "generator": ((batch, None) for batch in np.split(images, 4)),
        "dict": {"image": images},
        "float64": images.astype("float64"),
        "with labels": (images, np.zeros(len(images))),
    }
    collected = {name: collect(value, 500) for name, value in given.items()}
    for name, calibration in collected.items():
        np.testing.assert_array_equal(calibration.arrays[0], images, err_msg=name)
        assert calibration.note is None
    result = export(model, tmp_path / "dict.tflite", quantize="int8", calibration={"image": images})
    assert result.sha256 == exported["int8"].sha256


def test_more_images_than_the_limit_are_spread_over_an_array_and_cut_from_a_stream(images):
    spread = collect(images, 4)
    np.testing.assert_array_equal(spread.arrays[0], images[[0, 10, 20, 31]])
    cut = collect(endless(images), 25)
    assert cut.arrays[0].shape == (25, *SHAPE)
    assert "25 images, the limit" in cut.note
    exact = collect(Batches(images), len(images))
    assert exact.note is None


def test_bytes_as_images_calibrate_like_floats(export, tmp_path):
    image = keras.Input((9, 9, 3), name="image")
    scaled = keras.layers.Rescaling(1 / 127.5, -1, name="scale")(image)
    model = randomise(keras.Model(image, keras.layers.Conv2D(4, 3, name="conv")(scaled)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 9, 9, 3), dtype=np.uint8)
    whole = export(model, tmp_path / "bytes.tflite", quantize="int8", calibration=pixels, input_dtype="uint8")
    assert whole.notes == ()
    (tensor,) = tflite_export.read_flatbuffer(whole.path).inputs
    assert tensor.scales[0] == pytest.approx(1, rel=0.01) and tensor.zero_points == (0,)
    small = export(model, tmp_path / "small.tflite", quantize="int8", calibration=pixels / 255)
    assert "from 0 to 1, but layer 'scale' expects values up to 255" in small.notes[0]


def two_in_two_out() -> keras.Model:
    first, second = keras.Input((9, 8, 3), name="left image"), keras.Input((4,), name="extra")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(6, 3, name="conv")(first))
    x = keras.layers.Concatenate()([x, keras.layers.Dense(3, name="embed")(second)])
    heads = keras.layers.Dense(5, name="scores")(x), keras.layers.Dense(2, name="angle")(x)
    return randomise(keras.Model([first, second], heads, name="two"))


def test_several_inputs_and_outputs_keep_their_names(export, tmp_path):
    model = two_in_two_out()
    inputs = {"left image": some_images(8, shape=(9, 8, 3)), "extra": some_images(8, shape=(4,))}
    wanted = model(list(inputs.values()), training=False)
    for quantize in ("float32", "int8"):
        path = tmp_path / f"{quantize}.tflite"
        result = export(model, path, quantize=quantize, calibration=inputs)
        assert sorted(result.input_names) == ["extra", "left_image"]
        assert sorted(result.output_names) == ["angle", "scores"]
        named = {"left_image": inputs["left image"], "extra": inputs["extra"]}
        for name, output in zip(("scores", "angle"), wanted, strict=True):
            expected = keras.ops.convert_to_numpy(output)
            found = tflite_export.run_tflite(path, named, output=name)
            if quantize == "float32":
                assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
            else:
                assert signal_to_noise_db(expected, found) > 22


def test_nested_sequential_and_shared_layers(export, tmp_path):
    inner = keras.Sequential([keras.Input((9, 9, 3)), keras.layers.Conv2D(3, 3, padding="same")], name="inner")
    image = keras.Input((9, 9, 3), name="image")
    shared = keras.layers.DepthwiseConv2D(3, padding="same", name="shared")
    twice = keras.Model(image, shared(inner(shared(image))), name="twice")
    model = keras.Sequential([keras.Input((9, 9, 3)), twice, keras.layers.Flatten()], name="outer")
    for part in (inner, twice):
        randomise(part)
    assert export(model, tmp_path / "model.tflite").max_error < 1e-4


def test_inputs_in_a_dict(export, tmp_path):
    inputs = {"b": keras.Input((5,), name="b"), "a": keras.Input((4,), name="a")}
    outputs = {
        "second": keras.layers.Dense(3, name="y")(inputs["b"]),
        "first": keras.layers.Dense(2, name="x")(inputs["a"]),
    }
    result = export(randomise(keras.Model(inputs, outputs)), tmp_path / "model.tflite")
    assert result.max_error < 1e-4
    assert sorted(result.input_names) == ["a", "b"] and sorted(result.output_names) == ["x", "y"]


def test_half_precision_models_are_converted_to_float32_first(export, tmp_path, images):
    with_policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    image = keras.Input(SHAPE, name="image")
    x = keras.layers.Conv2D(8, 3, dtype=with_policy, name="conv")(image)
    x = keras.layers.BatchNormalization(dtype=with_policy, name="norm")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype=with_policy, name="pool")(x)
    half = randomise(keras.Model(image, keras.layers.Dense(CLASSES, dtype=with_policy, name="logits")(x)))
    result = export(half, tmp_path / "half.tflite")
    assert result.notes == ("converted from mixed_float16 to float32 first",)
    found, wanted = tflite_export.run_tflite(result.path, images), keras_outputs(half, images).astype("float32")
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()  # float16 has 11 bits


def test_float_islands_are_named(export, tmp_path):
    image = keras.Input((9, 9, 8), name="image")
    x = keras.layers.LayerNormalization(name="norm")(keras.layers.Conv2D(8, 3, name="conv")(image))
    model = randomise(keras.Model(image, x))
    result = export(
        model, tmp_path / "norm.tflite", quantize="int8", calibration=some_images(10, shape=(9, 9, 8)), clean=False
    )
    assert result.float_operators == ("NEG",)
    assert len(result.float_tensors) == 2
    assert "left in float32: 2 tensors of NEG" in str(result)


def test_operators_outside_the_runtime_are_named(export, tmp_path):
    image = keras.Input((9, 9, 3), name="image")
    model = keras.Model(image, keras.ops.erfinv(keras.ops.tanh(image)), name="special")
    with pytest.raises(ExportError, match=r"cannot convert model 'special' to float32: .*Erfinv") as caught:
        export(model, tmp_path / "model.tflite")
    # the other process's own error comes with it
    assert re.search(r"(?s)Traceback.*ConverterError", str(caught.value.__cause__))
    assert list(tmp_path.iterdir()) == []


def test_custom_layers_in_a_module_and_lambdas_work(export, custom, tmp_path):
    image = keras.Input((5, 5, 3), name="image")
    for layer in (custom.Doubled(), custom.Unregistered(), custom.Composite(), keras.layers.Lambda(lambda x: x * 3)):
        model = keras.Model(image, layer(image))
        assert export(model, tmp_path / f"{layer.name}.tflite").max_error < 1e-5


def test_auto_numbered_names_do_not_depend_on_what_the_worker_did_before(custom, worker, tmp_path):
    image = keras.Input((9, 9, 3), name="image")
    model = keras.Model(image, keras.ops.mean(custom.Composite()(image) * 2.0 + 1.0, axis=(1, 2)))
    first, second = export_many([(model, tmp_path / "1.tflite"), (model, tmp_path / "2.tflite")], worker=worker)
    assert first.sha256 == second.sha256


def test_a_class_that_the_worker_cannot_import_is_refused_at_once(export, tmp_path):
    class Local(keras.layers.Layer):
        def call(self, x):
            return x

    image = keras.Input((5, 5, 3), name="image")
    model = keras.Model(image, Local(name="mine")(image), name="odd")
    with pytest.raises(ModelError, match=r"layer 'mine' of model 'odd' .*move the class into a module"):
        export(model, tmp_path / "model.tflite")


def test_a_keras_file_whose_classes_are_unknown_is_refused(export, custom, tmp_path):
    image = keras.Input((5, 5, 3), name="image")
    keras.Model(image, custom.Unregistered()(image)).save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match=r"cannot load '.*model\.keras': .*Unregistered.* must be in a module"):
        export(tmp_path / "model.keras", tmp_path / "model.tflite")


def test_damaged_and_missing_keras_files(export, model, tmp_path):
    path = tmp_path / "model.keras"
    with pytest.raises(ModelError, match="there is no file"):
        export(path, tmp_path / "model.tflite")
    model.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="is cut short"):
        export(path, tmp_path / "model.tflite")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(ModelError, match=r"cannot load '.*model\.keras'"):
        export(path, tmp_path / "model.tflite")


def bad_images(kind: str, images: np.ndarray) -> np.ndarray:
    images = images.copy()
    if kind == "nan":
        images[3, 0, 0, 0] = np.nan
    elif kind == "inf":
        images[3:5] = np.inf
    return {"empty": images[:0], "one image": images[0], "words": np.full((4, *SHAPE), "a")}.get(kind, images)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "1 of 32 calibration images hold NaN"),
        ("inf", "2 of 32 calibration images hold NaN or infinite"),
        ("empty", "holds no images"),
        ("words", "must be numbers"),
        ("one image", r"has shape \(17, 15, 3\), but model 'small' takes \(n, 17, 15, 3\)"),
    ],
)
def test_bad_calibration_data(export, model, images, tmp_path, kind, message):
    with pytest.raises(DataError, match=message):
        export(model, tmp_path / "model.tflite", quantize="int8", calibration=bad_images(kind, images))
    assert list(tmp_path.iterdir()) == []


def test_calibration_that_is_missing_or_no_data(export, model, tmp_path):
    with pytest.raises(DataError, match="needs calibration images"):
        export(model, tmp_path / "model.tflite", quantize="int8")
    with pytest.raises(DataError, match="but got int"):
        export(model, tmp_path / "model.tflite", quantize="int8", calibration=3)
    with pytest.raises(DataError, match=r"different shapes: \(2, 2\) and \(3, 3\)"):
        export(
            model, tmp_path / "m.tflite", quantize="int8", calibration=iter([np.ones((1, 2, 2)), np.ones((1, 3, 3))])
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be one of"),
        ({"input_dtype": "int16"}, "input_dtype must be one of .* for float32"),
        ({"quantize": "int16x8", "input_dtype": "int8"}, "input_dtype must be one of .* for int16x8"),
        ({"target": "gpu"}, "target must be one of"),
        ({"target": "edgetpu"}, 'the Edge TPU runs int8 alone: give quantize="int8"'),
        ({"calibration_limit": 0}, "at least 1, not 0"),
    ],
)
def test_unknown_options(export, model, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        export(model, tmp_path / "model.tflite", **options)


class Subclassed(keras.Model):
    def call(self, x):
        return x


def legacy_model():
    """What a tf_keras model looks like to us; tf_keras itself is not a dependency."""
    legacy = type("Functional", (), {"__module__": "tf_keras.src.engine.functional", "name": "old", "layers": []})
    return legacy()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Subclassed, "no symbolic inputs, because it is subclassed"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "not built"),
        (lambda: keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 3)]), "dynamic shape"),
        (lambda: keras.Sequential([keras.Input((4,), batch_size=8), keras.layers.Dense(2)]), "fixed batch 8"),
        (legacy_model, "model 'old' is from tf_keras"),
        (lambda: 3.5, "expected a keras.Model .* got float"),
    ],
)
def test_models_without_a_tflite_form(export, tmp_path, build, message):
    with pytest.raises(ModelError, match=message):
        export(build(), tmp_path / "model.tflite")


def test_a_model_with_nan_weights_is_refused(export, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="dense")], name="broken")
    model.layers[0].bias.assign([np.nan, 0])
    with pytest.raises(ModelError, match="model 'broken' itself gives values"):
        export(model, tmp_path / "model.tflite")


def test_targets_that_cannot_be_written(export, model, exported, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        export(model, path)
    assert path.read_bytes() == b"precious"
    with pytest.raises(OutputError, match="there is no folder"):
        export(model, tmp_path / "none" / "model.tflite")
    with pytest.raises(OutputError, match="it is a folder"):
        export(model, tmp_path, force=True)
    with pytest.raises(OptionError, match="same path"):
        export_many([(model, path), (model, tmp_path / "." / "model.tflite")], force=True)
    assert export(model, path, force=True).sha256 == exported["float32"].sha256


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.parametrize("step", ["saving", "writing"])
def test_a_disk_that_fills_up_leaves_nothing_behind(export, model, tmp_path, step):
    import resource

    path = tmp_path / "model.tflite"
    path.write_bytes(b"precious")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(done, total, what):
        if step in what:  # a file may grow to 1000 bytes from here on: what a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))

    try:
        with pytest.raises(OutputError, match=r"cannot write .*large"):
            export(model, path, force=True, progress=fill_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["model.tflite"]


def test_progress_counts_to_the_end(export, model, tmp_path):
    seen = []
    export(model, tmp_path / "model.tflite", progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(6))
    assert {total for _, total, _ in seen} == {6}
    assert "converting" in seen[3][2]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_export_from_another_backend(exported, images, tmp_path, model, backend):
    pytest.importorskip(backend)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, keras, numpy, tflite_export\n"
        f"assert keras.backend.backend() == '{backend}'\n"
        "model = keras.models.load_model('model.keras')\n"
        "images = keras.ops.convert_to_tensor(numpy.load('images.npy'))\n"
        "result = tflite_export.export(model, 'model.tflite', quantize='int8', calibration=images)\n"
        "print(result.sha256, 'tensorflow' in sys.modules)\n"
    )
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:1] == [exported["int8"].sha256]
