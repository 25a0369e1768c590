"""Labels and normalization inside and beside a file."""

import json
import zipfile

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

import tflite_export
from tests.export.conftest import CLASSES
from tests.export.test_convert import keras_outputs
from tflite_export import DataError, OutputError, read_flatbuffer

LABELS = [f"class {i}" for i in range(CLASSES)]
NORMALIZATION = ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4])


@pytest.fixture(scope="module")
def told(worker, model, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("told") / "model.tflite"
    return tflite_export.export(
        model,
        path,
        quantize="int8",
        calibration=images,
        labels=LABELS,
        normalization=NORMALIZATION,
        worker=worker,
    )


def stored(path) -> bytes:
    """The metadata in a file, by the runtime's own schema."""
    data = path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    entries = {model.Metadata(i).Name(): model.Metadata(i).Buffer() for i in range(model.MetadataLength())}
    return model.Buffers(entries[b"TFLITE_METADATA"]).DataAsNumpy().tobytes()


def test_the_file_computes_what_it_did_and_tells_its_labels(told, model, images):
    assert zipfile.ZipFile(told.path).read("labels.txt").decode().splitlines() == LABELS
    wanted, found = keras_outputs(model, images), tflite_export.run_tflite(told.path, images)
    assert (wanted.argmax(1) == found.argmax(1)).mean() > 0.9
    assert read_flatbuffer(told.path).sha256 == told.sha256
    beside = json.loads(told.path.with_name("model.tflite.json").read_text())
    assert beside["labels"] == LABELS and list(beside["normalization"].values()) == list(NORMALIZATION)
    assert beside["sha256"] == told.sha256


def test_metadata_has_its_identifier_and_all_that_was_told(told):
    data = stored(told.path)
    assert data[4:8] == b"M001"
    # Vectors of floats lie whole in a flatbuffer, and strings as they are.
    for part in NORMALIZATION:
        assert np.asarray(part, "<f4").tobytes() in data
    assert b"labels.txt" in data and b"image" in data and b"logits" in data


def test_the_vendors_reader_understands_it(told):
    """Where MediaPipe is installed: its schema is generated from the format's own description."""
    reader = pytest.importorskip("mediapipe.tasks.metadata.metadata_schema_py_generated")
    parsed = reader.ModelMetadataT.InitFromObj(reader.ModelMetadata.GetRootAsModelMetadata(stored(told.path), 0))
    (graph,) = parsed.subgraphMetadata
    (image,), (logits,) = graph.inputTensorMetadata, graph.outputTensorMetadata
    options = image.processUnits[0].options
    assert np.allclose([options.mean, options.std], NORMALIZATION)
    assert image.content.contentProperties.colorSpace == reader.ColorSpaceType.RGB
    (file,) = logits.associatedFiles
    assert (file.name, file.type) == (b"labels.txt", reader.AssociatedFileType.TENSOR_AXIS_LABELS)


def test_weights_stay_aligned(told):
    data = told.path.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    start = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    stored_at = [
        model.Buffers(i).DataAsNumpy().__array_interface__["data"][0] - start
        for i in range(model.BuffersLength())
        if model.Buffers(i).DataLength()
    ]
    assert all(place % 16 == 0 for place in stored_at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS[:3]}, "there are 3 labels, but model 'small' has .10. outputs"),
        ({"labels": "cat"}, "labels must be a sequence of names"),
        ({"normalization": (0, 0)}, "std not 0"),
        ({"normalization": ([1, 2], [1, 2])}, "there are 2 means"),
        ({"normalization": ([1, 2], [1])}, "of one length"),
    ],
)
def test_what_cannot_be_told(export, model, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        export(model, tmp_path / "m.tflite", **options)
    assert not list(tmp_path.iterdir())


def test_the_file_beside_is_never_replaced(export, model, tmp_path):
    (tmp_path / "m.tflite.json").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        export(model, tmp_path / "m.tflite", labels=LABELS)
    assert (tmp_path / "m.tflite.json").read_text() == "precious"
